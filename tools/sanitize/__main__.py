"""Builds the CPU library under sanitizers and runs its tests there: `make sanitize`, or with the name of one of them.

The library is built by the package's own build in a copy of the tree, so nothing that is installed changes. Each
sanitizer first has to find a fault that was planted. What is not built here (torch, Python) is not watched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# What the build and the tests read.
TREE = (
    "CMakeLists.txt",
    "README.md",
    "pyproject.toml",
    "setup.py",
    "lesa_command.py",
    "build_backend",
    "csrc",
    "lesa_kernels",
    "tests",
)
CXX = os.environ.get("CXX", "g++")
REPORT = "report"


@dataclass(frozen=True)
class Sanitizer:
    """One build and its run.

    Args:
        flags: of the compiler.
        runtime: library that must be in the process first.
        options: of the runtime, by the variable that holds them.
        threads: variables that say how many threads there are.
        faults: functions of planted.cpp that must be found.
        tests: what runs.
        openmp: whether parallel regions run on threads of our own.
    """

    flags: tuple[str, ...]
    runtime: str
    options: dict[str, str]
    threads: dict[str, str]
    faults: tuple[str, ...]
    tests: tuple[str, ...]
    openmp: bool = False


SANITIZERS = {
    "address": Sanitizer(
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        runtime="libasan.so",
        options={
            # Python keeps what it allocated to its end; what leaks is measured by `make soak`.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        threads={"OMP_NUM_THREADS": "2"},
        faults=("past_the_end", "overflow"),
        tests=("tests/ops", "tests/cpu"),
    ),
    "thread": Sanitizer(
        flags=("-fsanitize=thread",),
        runtime="libtsan.so",
        options={"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"},
        threads={"MKL_NUM_THREADS": "1"},
        faults=("race",),
        tests=("tests/cpu",),
        openmp=True,
    ),
}  # fmt: skip


def copy_tree(folder: Path) -> None:
    """Copy what the build and the tests read; libraries that are built already stay behind."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=ignored)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)


def compile_library(source: Path, output: Path, *flags: str) -> Path:
    """Compile one of the sources beside this file into a shared library."""
    command = [CXX, "-std=c++20", "-g", "-O1", "-shared", "-fPIC", *flags, str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def find_library(name: str) -> str:
    """Return the path of a library of the compiler."""
    found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"sanitize: {CXX} has no {name}; install the sanitizers of your compiler")
    return found


def environment(sanitizer: Sanitizer, folder: Path) -> dict[str, str]:
    """Return the environment of a process that can load a library under the sanitizer."""
    # The runtime looks for the C++ library when it starts, and stops at the first exception if it was not there.
    preloaded = [find_library(sanitizer.runtime), find_library("libstdc++.so.6")]
    if sanitizer.openmp:
        preloaded.append(str(compile_library(HERE / "openmp.cpp", folder / "openmp.so", "-fopenmp", *sanitizer.flags)))
    # Into files, as pytest captures what is written to stderr.
    options = {name: f"{value}:log_path={folder / REPORT}" for name, value in sanitizer.options.items()}
    return os.environ | options | {"LD_PRELOAD": " ".join(preloaded), "PYTHONPATH": str(folder), **sanitizer.threads}


def python(*arguments: str) -> list[str]:
    """Return a command for this Python at fixed addresses, which ThreadSanitizer's shadow memory wants."""
    return ["setarch", "--addr-no-randomize", sys.executable, *arguments]


def find_planted(sanitizer: Sanitizer, folder: Path, variables: dict[str, str]) -> None:
    """See that each planted fault ends a process, and that a call without fault does not."""
    library = compile_library(HERE / "planted.cpp", folder / "planted.so", *sanitizer.flags)
    for name in ("nothing", *sanitizer.faults):
        code = f"import ctypes; ctypes.CDLL({str(library)!r}).{name}(10000)"
        result = subprocess.run(python("-c", code), env=variables, capture_output=True, text=True, check=False)
        if (result.returncode != 0) != (name != "nothing"):
            sys.exit(f"sanitize: {name} should {'pass' if name == 'nothing' else 'be found'}:\n{result.stderr}")
    reports(folder)
    print(f"planted faults found: {', '.join(sanitizer.faults)}", flush=True)


def reports(folder: Path) -> str:
    """Take away what the runtime wrote, and return it."""
    found = sorted(folder.glob(f"{REPORT}.*"))
    text = "\n".join(file.read_text(errors="replace") for file in found)
    for file in found:
        file.unlink()
    return text


def check(name: str, arguments: Sequence[str]) -> bool:
    """Build, find the planted faults, run the tests, and return whether they passed.

    Args:
        name: of the sanitizer.
        arguments: further ones of pytest.
    """
    sanitizer, folder, began = SANITIZERS[name], ROOT / "build" / "sanitize" / name, time.monotonic()
    print(f"{name}: {' '.join(sanitizer.flags)}, building in {folder.relative_to(ROOT)} ...", flush=True)
    copy_tree(folder)
    variables = environment(sanitizer, folder)
    find_planted(sanitizer, folder, variables)
    flags = " ".join(["-g", "-fno-omit-frame-pointer", *sanitizer.flags])
    build = os.environ | {"CXXFLAGS": flags, "LESA_BUILD": "cpu"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=build, check=True)
    print(f"{name}: built after {time.monotonic() - began:.0f} s, running {', '.join(sanitizer.tests)} ...", flush=True)
    tests = [*sanitizer.tests, "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    status = subprocess.run(python("-m", "pytest", *tests), cwd=folder, env=variables, check=False).returncode
    print(reports(folder), end="")
    result = "passed" if status == 0 else f"FAILED, exit status {status}"
    print(f"{name}: {result}, {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main() -> None:
    """Run the sanitizers that the command line names, or all of them."""
    names = [name for name in sys.argv[1:] if name in SANITIZERS]
    rest = [argument for argument in sys.argv[1:] if argument not in SANITIZERS]
    passed = [check(name, rest) for name in names or SANITIZERS]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
