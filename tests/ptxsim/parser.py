"""Reads the text of a PTX module: its variables, and of each kernel parameters, memory, labels and instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ptxsim.values import TYPES, PtxError, Values, integer, size_of


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!%p1 add.rn.f32 %f1, %f2, %f3` has op `add`, modifiers `rn` and `f32`, and a negated guard."""

    op: str
    modifiers: tuple[str, ...]
    arguments: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str

    @functools.cached_property
    def types(self) -> tuple[str, ...]:
        """The types among the modifiers; at least one."""
        found = tuple(modifier for modifier in self.modifiers if modifier in TYPES)
        if not found:
            raise PtxError("an instruction without a type")
        return found

    @property
    def type(self) -> str:
        """The last type: of all operands, or of the sources."""
        return self.types[-1]

    def one_of(self, *modifiers: str) -> str:
        """Return which of some modifiers it has.

        Raises:
            PtxError: if it has none of them: a variant that is not simulated.
        """
        for modifier in modifiers:
            if modifier in self.modifiers:
                return modifier
        raise self.unknown()

    @functools.cached_property
    def space(self) -> str:
        """The space of memory that it accesses."""
        names = [modifier.split("::")[0] for modifier in self.modifiers]
        return next((name for name in names if name in ("param", "shared", "local", "global", "const")), "generic")

    def unknown(self) -> PtxError:
        """Return the error for what is not simulated."""
        return PtxError(f"unknown instruction: {self.text}")


@dataclass(frozen=True)
class Variable:
    """What a declaration asks for, in bytes."""

    name: str
    size: int
    alignment: int
    element: int


@dataclass
class Layout:
    """Variables one after the other in one space, by name their offsets."""

    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, variable: Variable) -> None:
        """Put a variable behind the others."""
        self.offsets[variable.name] = aligned = -(-self.size // variable.alignment) * variable.alignment
        self.size = aligned + variable.size


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    parameters: list[Variable]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    params: Layout = field(default_factory=Layout)
    shared: Layout = field(default_factory=Layout)
    local: Layout = field(default_factory=Layout)


@dataclass
class Program:
    """A module: kernels are parsed when they are asked for, since most never are."""

    entries: dict[str, tuple[str, str]]  # name -> parameters, body
    variables: dict[str, Values]  # global and constant ones, by name their contents
    shared: list[Variable]  # of all kernels that name them
    dynamic: list[Variable]  # likewise, as large as the launch says


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that stand in no brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,])+", text) if part.strip())


@functools.cache
def registers_of(operand: str) -> list[str]:
    """Return the registers of a vector {a, b}, or the only one."""
    return [register.strip() for register in operand.strip("{}").split(",")]


@functools.cache
def address_of(operand: str) -> tuple[str, int]:
    """Return base and offset of an address [base+offset]."""
    inner = operand[1:-1].strip()
    found = re.fullmatch(r"(.*?)\s*([+-])\s*(-?\w+)", inner)
    if found is None:
        return inner, 0
    return found[1], integer(found[3]) * (1 if found[2] == "+" else -1)


_VARIABLE = re.compile(
    r"(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr(?:\s*\.(?!align)\w+)*(?:\s*\.align\s+\d+)?\s+)?"
    r"(?P<name>[\w$%.]+)(?P<dimensions>(?:\[\d*\])*)"
)


def _variable(declaration: str) -> Variable:
    found = _VARIABLE.search(declaration)
    if not found:
        raise PtxError(f"cannot read the declaration: {declaration!r}")
    element = size_of(found["type"])
    sizes = [int(size or 0) for size in re.findall(r"\[(\d*)\]", found["dimensions"])]
    return Variable(
        found["name"], element * int(np.prod(sizes, dtype=int)), int(found["alignment"] or element), element
    )


def parse(ptx: str) -> Program:
    """Read a module, its kernels' bodies not yet."""
    text = re.sub(r"/\*.*?\*/", " ", ptx, flags=re.DOTALL)
    noise = re.compile(r"\s*(\.version|\.target|\.address_size|\.file|\.loc\b|@@DWARF|\.pragma)")
    text = "\n".join(line.split("//")[0] for line in text.splitlines() if not noise.match(line))
    text = re.sub(r"\.section\b[^{]*\{.*?\n\s*\}", " ", text, flags=re.DOTALL)
    entries: dict[str, tuple[str, str]] = {}
    outside, end = "", 0
    for head in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", text):
        outside += text[end : head.start()]
        end = _closing_brace(text, head.end())
        entries[head[1]] = head[2], text[head.end() : end]
    outside += text[end:]
    program = Program(entries, {}, [], [])
    declarations = r"^\s*((?:\.\w+\s+)*?)\.(global|const|shared)\b([^;={]*)(?:=\s*(\{[^}]*\}|[^;]+))?;"
    for linkage, space, declaration, contents in re.findall(declarations, outside, flags=re.MULTILINE):
        variable = _variable(declaration)
        if space == "shared":
            (program.dynamic if "extern" in linkage else program.shared).append(variable)
        elif variable.size:
            program.variables[variable.name] = _contents(variable, contents)
    return program


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("a kernel without an end")


def _contents(variable: Variable, text: str) -> Values:
    contents = np.zeros(variable.size, np.uint8)
    values = [integer(value.strip()) for value in text.strip("{} ").split(",") if value.strip()]
    width = variable.element
    raw = b"".join((value & ((1 << 8 * width) - 1)).to_bytes(width, "little") for value in values)
    contents[: len(raw)] = np.frombuffer(raw, np.uint8)
    return contents


def parse_kernel(program: Program, name: str) -> Kernel:
    """Read one kernel of a module."""
    parameters, body = program.entries[name]
    kernel = Kernel(name, [_variable(text.replace(".param", "", 1)) for text in parameters.split(",") if text.strip()])
    for parameter in kernel.parameters:
        kernel.params.add(parameter)
    names = set(re.findall(r"[\w$]+", body))
    for variable in program.shared:
        if variable.name in names:
            kernel.shared.add(variable)
    for statement in _statements(body):
        _add(kernel, statement)
    for variable in program.dynamic:  # behind all others
        if variable.name in names:
            kernel.shared.add(variable)
    return kernel


def _statements(body: str) -> Iterator[str]:
    """Yield labels, as `name:`, and statements; braces of scopes are dropped, since names are unique."""
    for statement in re.sub(r"([\w$.]+):(?!:)", r" \1: ;", body).split(";"):
        words = " ".join(statement.split()).lstrip("{} ")
        if words and not words.startswith(".reg"):
            yield words


def _add(kernel: Kernel, statement: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.code)
    elif statement.startswith(".branchtargets"):  # its label stands before it
        label = next(label for label, place in reversed(kernel.labels.items()) if place == len(kernel.code))
        del kernel.labels[label]
        kernel.tables[label] = list(split_operands(statement.partition(" ")[2]))
    elif found := re.match(r"(?:\.extern )?\.(shared|local)\b(.*)", statement):
        (kernel.shared if found[1] == "shared" else kernel.local).add(_variable(found[2]))
    else:
        kernel.code.append(_instruction(statement))


def _instruction(text: str) -> Instruction:
    found = re.match(r"@(!?)(%?[\w$]+)\s+(.*)", text)
    head, _, operands = (found[3] if found else text).partition(" ")
    op, *modifiers = head.split(".")
    guard, negated = (found[2], bool(found[1])) if found else (None, False)
    return Instruction(op, tuple(modifiers), split_operands(operands), guard, negated, text)
