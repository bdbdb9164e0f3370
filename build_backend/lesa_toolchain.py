"""Finds what a build needs (torch, a C++ compiler, nvcc) and decides which libraries to build.

Nothing here imports torch: pip's isolation hides it, and its headers and libraries are all that a build wants.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIBRARIES = ("cpu", "cuda")
TORCH_MINIMUM = (2, 11)
NVCC_MINIMUM = (12, 0)
ARCHITECTURES = (80, 90, 100, 120)
OLDEST_ARCHITECTURE = 80  # nvcc converts float32 to bfloat16 from there on
# What TORCH_CUDA_ARCH_LIST may hold besides numbers: torch's own names, as far as the kernels run there.
ARCHITECTURE_NAMES = {
    "Ampere": ("8.0", "8.6+PTX"),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}

_TORCH_ROOT = """
import importlib.util
spec = importlib.util.find_spec("torch")
print(spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else "")
"""


class BuildError(SystemExit):
    """Ends the build with one readable message: pip shows it in place of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"lesa-kernels: {message}")


class Missing(Exception):
    """A tool or package is not there; the text says which one and becomes the reason in `lesa.status()`."""


@dataclass(frozen=True)
class Torch:
    """The torch to build against.

    Args:
        root: path, the folder of the package, which holds include/ and lib/.
        version: str, as in torch.__version__.
    """

    root: Path
    version: str


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Args:
        path: str, the executable.
        version: str, as in "13.0".
        known: tuple of int, the architectures it compiles for.
    """

    path: str
    version: str
    known: tuple[int, ...]


@dataclass
class Plan:
    """What a build will make, and why the rest is left out.

    Args:
        requested: str, the value of LESA_BUILD or "auto".
        targets: list of str, the libraries to build, without their leading underscore.
        skipped: dict, library -> reason.
        notes: list of str, further facts that a user should see.
    """

    requested: str
    targets: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    torch: Torch | None = None
    compiler: str | None = None
    nvcc: Nvcc | None = None
    architectures: str | None = None
    pybind11: Path | None = None

    def record(self) -> dict[str, Any]:
        """Return what `_build_info.json` keeps beside the package for `lesa.status()`."""
        return {
            "requested": self.requested,
            "built": self.targets,
            "skipped": self.skipped,
            "notes": self.notes,
            "torch": self.torch.version if self.torch else None,
            "nvcc": self.nvcc.version if self.nvcc else None,
            "architectures": self.architectures,
            "python": sysconfig.get_python_version(),
            "sources": sources_digest(),
        }


def sources_digest() -> str:
    """Return a hash of the libraries' sources, so that one can tell whether a library was built from those here."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *sorted((root / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_torch() -> Torch:
    """Return the torch of the interpreter that the package is built for.

    pip's isolation hides the user's packages through PYTHONPATH, so a child that ignores PYTHONPATH sees them.

    Raises:
        BuildError: if there is none or it is too old; the text says what to install.
    """
    spec = importlib.util.find_spec("torch")
    root = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    if root is None:
        child = [sys.executable, "-E", "-c", _TORCH_ROOT]
        root = subprocess.run(child, capture_output=True, text=True, cwd=os.sep, check=False).stdout.strip()
    if not root:
        raise BuildError(
            f"PyTorch was not found for {sys.executable}: install it first (`pip install torch`, or the build for your"
            " CUDA version), then run this again; if your installer builds in an environment of its own (uv, python -m"
            " build), add --no-build-isolation."
        )
    version = str(runpy.run_path(str(Path(root, "version.py")))["__version__"])
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < TORCH_MINIMUM:
        raise BuildError(f"PyTorch 2.11 or newer is required, {version} is installed: run `pip install 'torch>=2.11'`.")
    return Torch(Path(root), version)


def find_compiler() -> str:
    """Return the C++20 compiler: $CXX, else the first of c++, g++ and clang++ on PATH.

    Raises:
        Missing: if there is none, or it does not know C++20.
    """
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    path = next(filter(None, map(shutil.which, named or ["c++", "g++", "clang++"])), None)
    if path is None:
        raise Missing(f"the C++ compiler {named[0]} (CXX) was not found" if named else "no C++ compiler was found")
    command = [path, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    source = "#include <concepts>\n#include <span>\nstatic_assert(std::integral<int>);\n"
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"the C++ compiler {Path(path).name} cannot compile C++20 with its standard library")
    return path


def find_nvcc() -> Nvcc:
    """Return the CUDA compiler: $CUDACXX, else the one of $CUDA_HOME or $CUDA_PATH, of PATH, of /usr/local/cuda.

    Raises:
        Missing: if there is none, or it is too old for C++20.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next(filter(None, (shutil.which(place) for place in places if place)), None)
    if path is None:
        raise Missing("nvcc (the CUDA toolkit's compiler) was not found")
    banner = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", banner)
    if found is None:
        raise Missing(f"`{Path(path).name} --version` names no CUDA release")
    release = (int(found[1]), int(found[2]))
    if release < NVCC_MINIMUM:
        raise Missing(f"nvcc {release[0]}.{release[1]} is too old: C++20 needs CUDA 12.0 or newer")
    listing = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = tuple(sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listing)}))
    return Nvcc(path, f"{release[0]}.{release[1]}", known)


def choose_architectures(known: tuple[int, ...]) -> tuple[str, list[str]]:
    """Return CMake's list of architectures and notes on what was left out.

    CUDAARCHS wins, then TORCH_CUDA_ARCH_LIST. By default machine code for each of ARCHITECTURES, and PTX of the newest
    for later GPUs.

    Args:
        known: tuple of int, the architectures that nvcc compiles for.

    Raises:
        BuildError: if a variable names what cannot be compiled.
        Missing: if nothing is left.
    """
    asked, of_torch = os.environ.get("CUDAARCHS"), os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        _check_cudaarchs(asked, known)
        return asked, ["TORCH_CUDA_ARCH_LIST is set as well as CUDAARCHS: CUDAARCHS wins"] if of_torch else []
    if of_torch:
        return _of_torch_list(of_torch, known)
    chosen = [number for number in ARCHITECTURES if number in known]
    if not chosen:
        raise Missing("nvcc compiles for none of " + ", ".join(f"sm_{number}" for number in ARCHITECTURES))
    notes = [f"nvcc does not know sm_{number}: left out" for number in ARCHITECTURES if number not in known]
    return ";".join([*(f"{number}-real" for number in chosen), f"{chosen[-1]}-virtual"]), notes


def _check_cudaarchs(asked: str, known: tuple[int, ...]) -> None:
    """Refuse by name what CUDAARCHS must not hold; `native` is CMake's to resolve."""
    for entry in asked.split(";") if asked != "native" else ():
        found = re.fullmatch(r"(\d+)[af]?(-real|-virtual)?", entry)
        if found is None:
            raise BuildError(
                f"CUDAARCHS must be `native` or architectures from {OLDEST_ARCHITECTURE} on as in `80;90-real`, got"
                f" `{entry}` in `{asked}`."
            )
        number = int(found[1])
        if number < OLDEST_ARCHITECTURE:
            raise BuildError(
                f"CUDAARCHS=`{asked}` asks for sm_{number}, but the kernels need sm_{OLDEST_ARCHITECTURE} or newer:"
                " leave it out. For an older GPU set LESA_BUILD=cpu: without the CUDA library Triton serves, or the"
                " reference where Triton cannot."
            )
        if number not in known:
            raise BuildError(
                f"CUDAARCHS=`{asked}` asks for sm_{number}, but nvcc knows {', '.join(map(str, known))} only."
            )


def _of_torch_list(asked: str, known: tuple[int, ...]) -> tuple[str, list[str]]:
    """Return CMake's list for a TORCH_CUDA_ARCH_LIST, and notes.

    Images set it for all that is built in them: what these kernels or this nvcc cannot have is left out with a note.
    """
    if asked == "native":
        return asked, []
    entries: list[str] = []
    for word in filter(None, re.split(r"[\s;]+", asked)):
        entries += ARCHITECTURE_NAMES.get(word, (word,))
    chosen, notes = [], []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            names = ", ".join(ARCHITECTURE_NAMES)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must be `native` or hold numbers as in `8.0;9.0+PTX` or {names}, got `{entry}`"
                f" in `{asked}`: mend it, or set CUDAARCHS, as in CUDAARCHS='80;90', which wins."
            )
        number = int(found[1] + found[2])
        if number < OLDEST_ARCHITECTURE:
            notes.append(f"TORCH_CUDA_ARCH_LIST: the kernels need sm_{OLDEST_ARCHITECTURE}: sm_{number} left out")
        elif number not in known:
            notes.append(f"TORCH_CUDA_ARCH_LIST: nvcc does not know sm_{number}: left out")
        else:
            name = f"{number}{found[3]}"
            chosen += [f"{name}-real", f"{name}-virtual"] if found[4] else [f"{name}-real"]
    if not chosen:
        raise Missing(
            f"TORCH_CUDA_ARCH_LIST=`{asked}` holds nothing that nvcc and the kernels know (CUDAARCHS wins over it)"
        )
    return ";".join(dict.fromkeys(chosen)), notes


def find_pybind11() -> Path:
    """Return pybind11's include folder.

    Raises:
        Missing: if pybind11 or Python's own headers are not there.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise Missing("Python.h was not found (Debian and Ubuntu: python3-dev)")
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise Missing("pybind11 was not found")
    return Path(spec.origin).parent / "include"


def find_cmake() -> tuple[str, str]:
    """Return the paths of cmake and ninja, those of the build's own Python packages first.

    Raises:
        Missing: if one of them is not there.
    """
    found = []
    for tool, folder in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        spec = importlib.util.find_spec(tool)
        directory = getattr(importlib.import_module(tool), folder) if spec and spec.origin else None
        path = shutil.which(tool, path=directory) if directory else shutil.which(tool)
        if path is None:
            raise Missing(f"{tool} was not found")
        found.append(path)
    return found[0], found[1]


def _requested() -> tuple[str, tuple[str, ...], bool]:
    """Return LESA_BUILD's text, the libraries to try, and whether one that cannot be built is an error."""
    text = os.environ.get("LESA_BUILD", "").strip().lower()
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if not names:
        return "auto", LIBRARIES, False
    if names == ("none",):
        return text, (), True
    if not set(names) <= set(LIBRARIES):
        raise BuildError(f"LESA_BUILD must be `none` or a comma-separated list of cpu and cuda, got `{text}`.")
    return text, names, True


def needs_torch() -> bool:
    """Whether this build compiles against torch: all but LESA_BUILD=none."""
    return bool(_requested()[1])


def make_plan() -> Plan:
    """Look at the machine and at LESA_BUILD, and decide what to build.

    Raises:
        BuildError: if torch is missing or LESA_BUILD asks for what cannot be built here.
    """
    text, wanted, explicit = _requested()
    plan = Plan(text)
    plan.skipped = {name: f"LESA_BUILD={text} at build time" for name in LIBRARIES if name not in wanted}
    if not wanted:
        plan.skipped["inspect"] = "no library was built"
        return plan
    plan.torch = find_torch()
    for name in wanted:
        try:
            find_cmake()
            plan.compiler = find_compiler()
            if name == "cuda":
                plan.nvcc = find_nvcc()
                plan.architectures, notes = choose_architectures(plan.nvcc.known)
                plan.notes += notes
        except Missing as missing:
            if explicit:
                raise BuildError(f"LESA_BUILD={text} asks for {name}, but {missing}.") from None
            plan.skipped[name] = f"{missing} at build time"
        else:
            plan.targets.append(name)
    if not plan.targets:
        plan.skipped["inspect"] = "no library was built"
        return plan
    try:
        plan.pybind11 = find_pybind11()
        plan.targets.append("inspect")
    except Missing as missing:
        plan.skipped["inspect"] = f"{missing} at build time"
    return plan


def max_jobs() -> int:
    """Return the number of compilers to run at once: $MAX_JOBS, else one per core that this process may use.

    Raises:
        BuildError: if MAX_JOBS is not a positive number.
    """
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"MAX_JOBS must be a positive number, got `{text}`.")
    return int(text)


def describe(plan: Plan) -> str:
    """Return the plan as one line for the build's output."""
    built = ", ".join(f"_{name}" for name in plan.targets) or "nothing (the pure-Python package)"
    left_out = "".join(f"; without _{name}: {reason}" for name, reason in plan.skipped.items())
    return f"lesa-kernels: builds {built}{left_out}{''.join(f'; {note}' for note in plan.notes)}"


def save_record(plan: Plan, path: Path) -> None:
    """Write the plan's record as JSON."""
    path.write_text(json.dumps(plan.record(), indent=2) + "\n", encoding="utf-8")
