"""The house's arrows point downward: each part of the package imports only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lesa_kernels"

# Part -> the parts right below it. It may import these and whatever lies below them.
BELOW: dict[str, set[str]] = {
    "machine": set(),
    "checks": set(),
    "ops": {"checks"},
    "backends": {"ops"},
    "schedule": {"checks"},
    "plan": {"schedule"},
    "stopwatch": set(),
    "trajectories": {"checks"},
    "files": set(),
    "guidance": {"checks"},
    "ring": {"ops"},
    "predictors": {"plan", "ops", "files", "guidance"},
    "session": {"plan", "ring"},
    "integrations": {"session", "predictors", "trajectories", "stopwatch"},
    "training": {"session", "predictors", "trajectories", "machine"},
    "cli": {"integrations", "training", "backends"},
}
# Outside package -> the only parts that may know it.
KEEPERS = {
    "diffusers": {"integrations"},
    "triton": {"backends"},
    "ctypes": {"backends"},
    "typer": {"cli"},
    "matplotlib": {"training"},
}


def _files() -> list[Path]:
    """Every file but the package's own namespace, which lies above all parts."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def _allowed(part: str) -> set[str]:
    direct = BELOW[part]
    return direct.union(*(_allowed(below) for below in direct))


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported(tree: ast.AST, path: Path) -> set[str]:
    """Dotted names of all modules and names that a file imports, wherever in the file the import stands."""
    package = ["lesa_kernels", *path.relative_to(PACKAGE).parent.parts]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, path: Path) -> list[str]:
    """Arrows of one file that point up, and outside packages that it must not know."""
    part, tree = _part(path), ast.parse(source)
    found = []
    for name in sorted(_imported(tree, path)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "lesa_kernels" and target != part and target not in _allowed(part):
            found.append(f"{part} must not import {name}")
        if part not in KEEPERS.get(top, {part}):
            found.append(f"{part} must not know {top}")
    return found


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_arrows_point_downward(path: Path) -> None:
    assert _part(path) in BELOW, f"{path.name}: say in BELOW what this part may import"
    assert violations(path.read_text(encoding="utf-8"), path) == []


def test_schedule_knows_integers_only() -> None:
    path = PACKAGE / "schedule.py"
    assert not any(name.split(".")[0] == "torch" for name in _imported(ast.parse(path.read_text()), path))


def test_parts_form_no_cycle() -> None:
    assert all(part not in _allowed(part) for part in BELOW)


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("schedule.py", "from lesa_kernels.plan import Plan", "schedule must not import lesa_kernels.plan.Plan"),
        ("schedule.py", "from lesa_kernels import plan", "schedule must not import lesa_kernels.plan"),
        (
            "predictors/base.py",
            "from ..session import Session",
            "predictors must not import lesa_kernels.session.Session",
        ),
        ("ops/gram.py", "def f():\n    import lesa_kernels.backends", "ops must not import lesa_kernels.backends"),
        ("session.py", "import diffusers.hooks", "session must not know diffusers"),
        ("plan.py", "import lesa_kernels", "plan must not import lesa_kernels"),
    ],
)
def test_a_wrong_arrow_is_found(file: str, source: str, fault: str) -> None:
    assert violations(source, PACKAGE / file) == [fault]
