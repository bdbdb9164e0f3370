"""Runs a command, the tests say, with the other torches that the package serves, on the libraries as they are built.

`make compatibility` and `make compatibility-all` do it; what cannot be had is named and left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("2.11.0", "2.12.1", "2.13.0")
FOLDER = ROOT / "build" / "torch"


class NotOfferedError(Exception):
    """pip finds no such build; the text says why."""


def installed() -> str:
    """Return the version of torch in this environment, without its build."""
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip().partition("+")[0]


def fetch(version: str) -> Path:
    """Download the CPU build of a torch.

    Args:
        version: without the name of the build.

    Returns:
        A folder for PYTHONPATH.

    Raises:
        NotOfferedError: where pip finds no such build (a build for GPUs takes gigabytes and is not tried).
    """
    folder = FOLDER / version
    if (folder / "torch").is_dir():
        return folder
    unfinished = folder.with_name(f".{version}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--upgrade"]
    result = subprocess.run(
        [*pip, "--target", str(unfinished), f"torch=={version}+cpu"], capture_output=True, text=True
    )
    if result.returncode:
        if re.search("No matching distribution|ResolutionImpossible", result.stderr):
            raise NotOfferedError("pip finds no CPU build of it for this Python" + _constraints(result.stdout))
        sys.exit(f"torch {version}+cpu could not be fetched:\n{result.stderr}")
    unfinished.replace(folder)
    return folder


def _constraints(said: str) -> str:
    """Return the constraints that pip names; it does so whether they exclude a build or there is none."""
    found = sorted(set(re.findall(r"\(constraint\) (\S+)", said)))
    return f" under its constraint {', '.join(found)}" if found else ""


def main(command: Sequence[str], versions: Sequence[str] = VERSIONS) -> int:
    """Run a command with every other torch than the environment's own, and print what ran.

    Args:
        command: and its arguments.
        versions: of torch.

    Returns:
        1 if the command failed with one of them, else 0.
    """
    own = installed()
    outcomes = {own: "in this environment, which `make test` tests"}
    for version in versions:
        if version == own:
            continue
        try:
            folder = fetch(version)
        except NotOfferedError as reason:
            outcomes[version] = f"not run: {reason}"
            continue
        print(f"torch {version} ...", flush=True)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, check=False).returncode
        outcomes[version] = "passed" if status == 0 else f"FAILED, exit status {status}"
    print("\n".join(f"torch {version}: {outcome}" for version, outcome in sorted(outcomes.items())))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tools.compatibility COMMAND [ARGUMENT ...]")
    sys.exit(main(sys.argv[1:]))
