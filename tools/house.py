"""`python -m tools.house`: counts what the repository's structure is held to; tests/build/test_house.py checks it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CODE = {".py", ".h", ".cuh", ".cu", ".cpp", ".inc", ".in"}
# Names that Python, pytest and CMake give.
GIVEN = {"__init__.py", "__main__.py", "conftest.py"}
TEMPLATE = "identity"
_NAMES_TEMPLATE = re.compile(rf"lesa(::|\.){TEMPLATE}\b|\b{TEMPLATE}_(case|entries)\b")


@dataclass(frozen=True)
class Figure:
    """One figure of the repository's structure.

    Args:
        name: what is counted.
        value: the count.
        most: the largest that is allowed; None where it is shown only.
    """

    name: str
    value: int
    most: int | None = None


def tracked_files() -> list[Path]:
    """Return the files of the repository, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def op_stems() -> set[str]:
    """Return the stems of the families of ops."""
    from lesa_kernels import ops

    return {op.family for op in ops.OPS.values()}


def template_files() -> list[str]:
    """Return the files of the template op that CONTRIBUTING.md lists."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("<!-- the files of an op -->")[2].partition("<!-- end of the files -->")[0]
    return re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)


def unlisted_template_files() -> list[str]:
    """Return files of code that name the template op and are not in the list of CONTRIBUTING.md."""
    listed = set(template_files())
    found = [path for path in tracked_files() if path.suffix in CODE and path != Path("tools/house.py")]
    return [
        str(path)
        for path in found
        if str(path) not in listed
        and (path.stem.endswith(TEMPLATE) or _NAMES_TEMPLATE.search((ROOT / path).read_text(encoding="utf-8")))
    ]


def repeated_names() -> dict[str, list[str]]:
    """Return file names that occur more than once, other than those of one op on its floors."""
    stems, places = op_stems(), dict[str, list[str]]()
    for path in tracked_files():
        stem = path.name.split(".")[0].removeprefix("test_").removeprefix("bench_").removesuffix("_entries")
        if path.suffix in CODE and path.name not in GIVEN and stem not in stems:
            places.setdefault(path.name, []).append(str(path))
    return {name: found for name, found in places.items() if len(found) > 1}


def imports_within(folder: Path) -> dict[str, set[str]]:
    """Return module -> the modules of the same package that it imports, at its top or in a function."""
    package = "lesa_kernels." + folder.name
    modules = {path.stem for path in folder.glob("*.py") if path.name != "__init__.py"}
    arrows: dict[str, set[str]] = {}
    for name in sorted(modules):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        arrows[name] = {source.removeprefix(package + ".") for source in sources if source.startswith(package + ".")}
    return arrows


def floors(arrows: dict[str, set[str]]) -> int:
    """Return the modules on the longest way down."""

    def height(name: str) -> int:
        return 1 + max((height(below) for below in arrows[name]), default=0)

    return max(map(height, arrows))


def command_options() -> dict[str, int]:
    """Return command -> the number of what may be given to it beyond what must be."""
    from typer.main import get_command

    from lesa_kernels.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return {name: sum(not each.required for each in command.params) for name, command in commands.items()}


def glossary_words() -> int:
    """Return the number of words that docs/glossary.md explains."""
    return len(re.findall(r"^\| \*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE))


def lines_of(*folders: str) -> int:
    """Return the lines of code in some folders."""
    found = [path for path in tracked_files() if path.parts[0] in folders and path.suffix in CODE]
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in found)


def figures() -> list[Figure]:
    """Count everything."""
    arrows = imports_within(ROOT / "lesa_kernels/integrations")
    names = Counter(path.name for path in tracked_files())
    options = command_options()
    return [
        Figure("files to touch for a new op", len(template_files()), 12),
        Figure("files of the template op that CONTRIBUTING.md does not list", len(unlisted_template_files()), 0),
        Figure("file names that occur twice, other than an op's", len(repeated_names()), 0),
        Figure("files in integrations", len(arrows), 14),
        Figure("imports among them", sum(map(len, arrows.values())), 40),
        Figure("floors of them", floors(arrows), 6),
        Figure("options of lesa train", options["train"], 13),
        Figure("options of lesa calibrate", options["calibrate"], 13),
        Figure("words in the glossary", glossary_words(), 8),
        Figure("lines of README.md", len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()), 100),
        Figure("lines of lesa_kernels and csrc", lines_of("lesa_kernels", "csrc")),
        Figure("tracked files", sum(names.values())),
    ]


def main() -> None:
    """Print all figures; end with status 1 where one is larger than allowed."""
    table = Table("what", "count", "at most")
    found = figures()
    for figure in found:
        table.add_row(figure.name, str(figure.value), "" if figure.most is None else str(figure.most))
    Console().print(table)
    raise typer.Exit(any(figure.most is not None and figure.value > figure.most for figure in found))


if __name__ == "__main__":
    typer.run(main)
