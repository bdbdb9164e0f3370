"""Builds the libraries with CMake and ninja; the package's metadata is in pyproject.toml."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import lesa_toolchain  # noqa: E402  (found through the line above when setup.py runs without the backend)

PACKAGE = "lesa_kernels"
RECORD = "_build_info.json"


class LesaDistribution(Distribution):
    """Holds the build's plan, so that the wheel's tag says whether it contains machine code."""

    _plan: lesa_toolchain.Plan | None = None

    @property
    def plan(self) -> lesa_toolchain.Plan:
        """The build's plan, made when it is first needed."""
        if self._plan is None:
            self._plan = lesa_toolchain.make_plan()
        return self._plan

    def has_ext_modules(self) -> bool:
        """Whether the wheel is for one platform only."""
        return bool(self.plan.targets)


class Build(build):
    """The build: Python files, then the libraries or the record of why there are none."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]

    def run(self) -> None:
        """Build into an empty folder: a library that an earlier build left there must not end up in this wheel."""
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Compiles the planned libraries in build/native, which is kept, and installs each by rename."""

    def _installed(self) -> dict[str, str]:
        """Return target -> name of its file in the package."""
        suffix = {"inspect": sysconfig.get_config_var("EXT_SUFFIX")}
        return {name: f"_{name}{suffix.get(name, '.so')}" for name in self.distribution.plan.targets}

    def get_outputs(self) -> list[str]:
        """Return the files that this command adds to the package."""
        return [str(Path(self.build_lib, PACKAGE, name)) for name in (*self._installed().values(), RECORD)]

    def get_output_mapping(self) -> dict[str, str]:
        """Return the place of each file in the source tree, for editable installs."""
        return {output: str(Path(PACKAGE, Path(output).name)) for output in self.get_outputs()}

    def run(self) -> None:
        """Configure, compile, install."""
        plan = self.distribution.plan
        print(lesa_toolchain.describe(plan), flush=True)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / PACKAGE if in_place else Path(self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / "native"
        if plan.targets:
            self._compile(plan, folder)
        names = self._installed()
        for stale in [*package.glob("_cpu*.so"), *package.glob("_cuda*.so"), *package.glob("_inspect*.so")]:
            if stale.name not in names.values():
                stale.unlink()
        for name, file in names.items():
            _replace(folder / f"_{name}.so", package / file)
        lesa_toolchain.save_record(plan, package / RECORD)

    def _compile(self, plan: lesa_toolchain.Plan, folder: Path) -> None:
        cmake, ninja = lesa_toolchain.find_cmake()
        identity = f"{ROOT}\n{plan.compiler}\n{plan.nvcc}\n"
        identity_file = folder / "identity.txt"
        if not identity_file.exists() or identity_file.read_text(encoding="utf-8") != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            identity_file.write_text(identity, encoding="utf-8")
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,  # each isolated build has its own ninja, the kept cache names the last one's
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": plan.compiler,
            "LESA_TARGETS": ";".join(plan.targets),
            "LESA_TORCH": plan.torch.root,
            "LESA_PYTHON_INCLUDE": sysconfig.get_path("include"),
        }
        if plan.pybind11:
            options["LESA_PYBIND11_INCLUDE"] = _stable_copy(plan.pybind11, ROOT / "build" / "pybind11")
        if plan.nvcc:
            options |= {"CMAKE_CUDA_COMPILER": plan.nvcc.path, "CMAKE_CUDA_ARCHITECTURES": plan.architectures}
            options |= {"CMAKE_CUDA_HOST_COMPILER": plan.compiler}
        defines = [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines], check=True)
            subprocess.run([cmake, "--build", str(folder), "--parallel", str(lesa_toolchain.max_jobs())], check=True)
        except subprocess.CalledProcessError:
            raise lesa_toolchain.BuildError(
                f"compiling {', '.join(plan.targets)} failed, the compiler's own words stand above. LESA_BUILD=cpu"
                " builds without CUDA, LESA_BUILD=none installs the pure-Python package."
            ) from None


def _stable_copy(source: Path, destination: Path) -> Path:
    """Keep a copy of headers from an isolated build's folder: with a path of its own each build would compile anew."""
    for header in source.rglob("*.h"):
        copy = destination / header.relative_to(source)
        if not copy.exists() or not filecmp.cmp(header, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)
    return destination


def _replace(source: Path, destination: Path) -> None:
    """Install a library by rename: writing into the old file would crash a process that has it mapped."""
    if destination.exists() and filecmp.cmp(source, destination, shallow=False):
        return
    fresh = destination.with_name(f"{destination.name}.{os.getpid()}.new")
    shutil.copyfile(source, fresh)
    os.replace(fresh, destination)


# One wheel for every Python: the libraries of ops use no Python symbol. The exception is the inspection module, since
# pybind11 cannot use the limited API: its file's name says which Python it fits, elsewhere lesa.status() says why not.
setup(
    distclass=LesaDistribution,
    cmdclass={"build": Build, "build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
