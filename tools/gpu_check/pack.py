"""Collects what a machine with a GPU cannot fetch or would have to build, and prints the commands to run there.

`python -m tools.gpu_check.pack`, or `make gpu-pack`, which builds the libraries first.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import commit
from tools.gpu_check.load import LIBRARIES
from tools.gpu_check.phases import CALLS
from tools.gpu_check.settings import FILES, PACK, PACKED, ROOT

sys.path.insert(0, str(ROOT / "build_backend"))

from lesa_toolchain import sources_digest

ARCHITECTURE = "90"
LARGEST_MIB = 64
"""What travels to the machine, the checkout included."""
WHEELS = ("diffusers", "importlib_metadata")
"""Of the packages that tests and the model of full size need, those that the machine does not have."""


def libraries(package: Path) -> list[Path]:
    """Return the compiled libraries and their record.

    Args:
        package: folder that they are in.

    Raises:
        ValueError: when one is missing or was built for other GPUs.
    """
    paths = [package / name for name in LIBRARIES]
    if missing := [path.name for path in paths if not path.exists()]:
        raise ValueError(f"{package} must hold {', '.join(missing)}: run `make setup` where nvcc is")
    record = json.loads((package / "_build_info.json").read_text())
    if record.get("sources") != sources_digest():
        raise ValueError(f"the libraries in {package} must be built from csrc as it is now: run `make setup`")
    built = record["architectures"] or "none"
    if ARCHITECTURE not in {part.split("-")[0] for part in built.split(";")}:
        raise ValueError(f"_cuda.so must hold code for sm_{ARCHITECTURE}, it was built for {built}: set CUDAARCHS")
    return paths


def travelling_bytes(pack: Path) -> int:
    """Return the size of the checkout, without what git ignores, and of the pack."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name] + list(pack.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def fetch_wheels(folder: Path) -> str:
    """Download the wheels, for any Python; return what went wrong, or nothing."""
    wanted = []
    for name in WHEELS:
        try:
            wanted.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            wanted.append(name)
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", str(folder), *wanted], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stderr.strip()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the pack; it is emptied first.")] = PACK,
    wheels: Annotated[bool, typer.Option(help="Whether to download the wheels that the machine lacks.")] = True,
) -> None:
    """Collect the libraries, the wheels and the commit's name."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        for path in libraries(ROOT / "lesa_kernels"):
            shutil.copy2(path, out / path.name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if wheels and (fault := fetch_wheels(out / "wheels")):
        typer.echo(f"without wheels, so without diffusers' models: {fault}", err=True)
    (out / PACKED).write_text(json.dumps({"commit": commit(), "wheels": sorted(p.name for p in out.rglob("*.whl"))}))
    size = travelling_bytes(out) / 2**20
    if size > LARGEST_MIB:
        raise typer.BadParameter(f"checkout and pack must not exceed {LARGEST_MIB} MiB, they take {size:.1f} MiB")
    where = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    typer.echo(f"{where}: {', '.join(sorted(p.name for p in out.rglob('*') if p.is_file()))}; {size:.1f} MiB in all")
    typer.echo(f"Copy the checkout with {where} to the machine with the GPU and run there:")
    for call in ("first", "second"):
        typer.echo(
            f"  python3 -m tools.gpu_check {call} --pack {where} --out REPORT-{call}  # {CALLS[call][1]} s at most"
        )
    typer.echo(
        f"Each report is {len(FILES)} files. Then, here: python -m tools.gpu_check.publish REPORT-first REPORT-second"
    )


if __name__ == "__main__":
    typer.run(main)
