"""Docstrings of public names: arguments, what comes back, errors, shapes of tensors, where a method is from."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import lesa_kernels
from lesa_kernels import integrations, training
from lesa_kernels.ops import forecast, gram, identity, kan, predict

MODULES: tuple[ModuleType, ...] = (
    lesa_kernels, training, integrations, forecast, gram, identity, kan, predict)  # fmt: skip
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$", re.MULTILINE)


def sections(docstring: str) -> dict[str, str]:
    """The summary and the sections of a docstring in Google's style."""
    parts = SECTION.split(inspect.cleandoc(docstring))
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> dict[str, str]:
    """Name and text of each entry of a section."""
    found = re.split(r"^(\w[\w.*]*):", textwrap.dedent(section.strip("\n")), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def own_functions(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods that a class of ours defines."""
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method, once."""
    seen = set()
    for module in MODULES:
        for name in module.__all__ if hasattr(module, "__all__") else own_names(module):
            each = getattr(module, name)
            if not callable(each) or not getattr(each, "__module__", "").startswith("lesa_kernels") or id(each) in seen:
                continue
            seen.add(id(each))
            yield f"{module.__name__}.{name}", each
            if isinstance(each, type):
                yield from (
                    (f"{module.__name__}.{name}.{method}", function) for method, function in own_functions(each)
                )


def own_names(module: ModuleType) -> list[str]:
    return [
        name
        for name, each in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(each) and each.__module__ == module.__name__
    ]


PUBLIC = dict(public())
each_name = pytest.mark.parametrize("name", PUBLIC)


def docstring(each: Any) -> str:
    return inspect.getdoc(each) or ""


def refers_elsewhere(text: str) -> bool:
    """Whether a method's docstring leaves the rest to the one that it implements."""
    return bool(re.search(r"\bSee `[\w.]+`|\bAs `[\w.]+`|`enable` for the length", text))


def parameters(each: Any) -> list[inspect.Parameter]:
    if isinstance(each, type) and (issubclass(each, enum.Enum | Warning)):
        return []
    found = inspect.signature(each).parameters.values()
    return [parameter for parameter in found if parameter.name not in ("self", "cls")]


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the errors in the raise statements of a function's own body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


@each_name
def test_it_says_what_every_argument_is(name: str) -> None:
    each = PUBLIC[name]
    text = docstring(each)
    assert text, f"{name} has no docstring"
    if refers_elsewhere(text):
        return
    described = entries(sections(text).get("Args", ""))
    assert [p.name for p in parameters(each) if p.name not in described] == []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters(each)):
        assert set(described) <= {p.name for p in parameters(each)}


@each_name
def test_it_gives_the_shapes_of_tensors(name: str) -> None:
    each = PUBLIC[name]
    described = entries(sections(docstring(each)).get("Args", ""))
    for parameter in parameters(each):
        if "Tensor" in str(parameter.annotation) and parameter.name in described:
            text = described[parameter.name]
            assert re.search(r"\[.*\]|shape|scalar", text), f"{name}: {parameter.name} has no shape: {text.strip()}"


@each_name
def test_it_says_what_comes_back(name: str) -> None:
    each = PUBLIC[name]
    if isinstance(each, type):
        return
    returns = inspect.signature(each).return_annotation
    text = docstring(each)
    if returns in ("None", None, inspect.Signature.empty) or refers_elsewhere(text) or "Generator" in str(returns):
        return
    assert "Returns" in sections(text) or re.match(r"(Return|Whether|The|Give|Tell)\b", text), text


@each_name
def test_it_names_its_errors(name: str) -> None:
    each = PUBLIC[name]
    functions = [each]
    if isinstance(each, type):
        made = [vars(each)[own] for own in ("__init__", "__post_init__") if own in vars(each)]
        # The __init__ of a dataclass has no source.
        functions = [function for function in made if function.__code__.co_filename == inspect.getfile(each)]
    text = docstring(each)
    if refers_elsewhere(text):
        return
    named = set(entries(sections(text).get("Raises", "")))
    for function in functions:
        assert raised(function) - {"AssertionError", "NotImplementedError"} <= named


def methods() -> list[str]:
    """Predictors with a method of their own."""
    kinds = {name: each for name, each in PUBLIC.items() if isinstance(each, type)}
    plain = (lesa_kernels.Predictor, lesa_kernels.Reuse)
    return [name for name, each in kinds.items() if issubclass(each, lesa_kernels.Predictor) and each not in plain]


@pytest.mark.parametrize("name", methods())
def test_a_method_says_where_it_is_from(name: str) -> None:
    each = PUBLIC[name]
    assert "arXiv" in docstring(each) + str(inspect.getmodule(each).__doc__)
