"""What the compiler made of the CUDA kernels: the resource report and the machine code of the built library."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import lesa_kernels as lesa
from lesa_kernels.backends import libraries

LIBRARY = Path(lesa.__file__).parent / "_cuda.so"
ELEMENT_BYTES = {"float": 4, "float16": 2, "bfloat16": 2}
# Of a multiprocessor; a thread has at most 255 of them, in steps of 8.
REGISTERS = 65536
# Loads that must be under way together, or all of a kernel's inputs if they are fewer: csrc/cuda/launch_config.h.
LOADS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Shape:
    """The template arguments of a kernel over features, as its name has them."""

    family: str
    inputs: int
    width: int
    strided: bool
    loads: int  # bytes of one load
    stores: int  # bytes of one store; 0 where it writes no features

    @property
    def narrow(self) -> bool:
        """Whether it is for contiguous tensors that are not aligned alike: wider vectors would fit into registers."""
        return not self.strided and 2 * self.width * self.inputs <= 64 and max(self.loads, self.stores) < 16

    @classmethod
    def of(cls, name: str) -> Shape | None:
        """Read a kernel's name; None for kernels that are not over features."""
        found = re.search(r"(combine|reduce|gram|copy)_kernel<([^>]*)>", name)
        if found is None:
            return None
        arguments = [argument.removeprefix("lesa::") for argument in found[2].split(", ")]
        sizes = [ELEMENT_BYTES[argument] for argument in arguments if argument in ELEMENT_BYTES]
        numbers = [int(argument) for argument in arguments if argument.isdigit()]
        flags = [argument == "true" for argument in arguments if argument in ("true", "false")]
        *_, width = numbers
        to, source = (sizes[0], sizes[-1])
        only_sums = found[1] == "gram" or (found[1] == "reduce" and not flags[1])
        stores = 0 if only_sums else width * to
        return cls(found[1], numbers[0] if len(numbers) == 2 else 1, width, flags[0], width * source, stores)


def _cuobjdump(*options: str) -> str:
    """Run NVIDIA's disassembler, the toolkit's or the copy in the triton package, and read the names of kernels."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := find_spec("triton")) and triton.origin:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip("cuobjdump was not found, neither on the PATH nor in the triton package")
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt (binutils) was not found")
    text = subprocess.run([found, *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if not LIBRARY.exists():
        pytest.skip(libraries.load_library("_cuda").reason)


@pytest.fixture(scope="module")
def resources() -> list[tuple[str, dict[str, int]]]:
    """Name and resources of each kernel, for every architecture in the library."""
    found = re.findall(r"Function (.+):\n\s+(REG:.*)", _cuobjdump("--dump-resource-usage"))
    return [(name, {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}) for name, text in found]


def _threads_meant(name: str) -> int:
    """How many threads of a kernel are to share a multiprocessor; predict.cuh, gram.cuh and kan.cuh have exceptions."""
    shape = Shape.of(name)
    if shape is not None and shape.family == "combine":
        items = 1 if shape.strided else max(1, min(LOADS_IN_FLIGHT * 16 // (shape.inputs * shape.loads), 8))
        held = shape.inputs * shape.width * 2 ** (items.bit_length() - 1)
        return 128 * (4 if shape.strided else min(512 // (32 + held), 9))
    many_inputs = shape is not None and shape.inputs > {"reduce": 8, "gram": 9}.get(shape.family, shape.inputs)
    high_order = re.search(r"kan_\w+_kernel<.*, 8>", name) is not None
    return 256 if many_inputs or high_order else 512


def test_kernels_keep_everything_in_registers(resources: list[tuple[str, dict[str, int]]]) -> None:
    assert resources
    assert not [name for name, used in resources if used["STACK"] or used["LOCAL"]]


def test_registers_leave_room_for_the_threads_that_are_meant_to_run(
    resources: list[tuple[str, dict[str, int]]],
) -> None:
    limits = {name: REGISTERS // _threads_meant(name) // 8 * 8 for name, _ in resources}
    assert not [(name, used["REG"]) for name, used in resources if used["REG"] > min(limits[name], 255)]


def _machine_code(architecture: str) -> Iterator[tuple[str, list[str]]]:
    """Name and opcodes of each kernel."""
    text = _cuobjdump("-sass", "-arch", f"sm_{architecture}")
    for part in text.split("Function : ")[1:]:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", part)
        yield part.splitlines()[0], opcodes


def _accesses(opcodes: list[str], kind: str, size: int) -> list[int]:
    """Positions of the global loads (LDG) or stores (STG) of this many bytes."""
    suffix = {16: ".128", 8: ".64", 4: "", 2: ".U16"}[size]
    pattern = re.compile(rf"{kind}\.E(?:\.EF|\.NA)?{re.escape(suffix)}(\.CONSTANT|\.SYS|\.STRONG\.\w+)*$")
    return [position for position, opcode in enumerate(opcodes) if pattern.match(opcode)]


def _most_together(opcodes: list[str], loads: list[int]) -> int:
    """The longest row of loads with no floating-point sum and no store between them."""
    best = run = 0
    for position, opcode in enumerate(opcodes):
        if position in loads:
            run += 1
            best = max(best, run)
        elif opcode.startswith(("FFMA", "FADD", "STG")):
            run = 0
    return best


ARCHITECTURES = [
    pytest.param("80", marks=pytest.mark.exhaustive),
    "90",
    pytest.param("100", marks=pytest.mark.exhaustive),
    pytest.param("120", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_are_loaded_and_stored_whole(architecture: str) -> None:
    """Vector kernels move vectors of their width and load several before the first sum.

    Up to 8 inputs there is a kernel for vectors of 16 bytes.
    """
    if f"{architecture}-real" not in libraries.read_record()["architectures"]:
        pytest.skip(f"sm_{architecture} is not among the architectures that were built")
    widest: dict[tuple[str, int], int] = {}
    for name, opcodes in _machine_code(architecture):
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], name
        shape = Shape.of(name)
        if shape is None or shape.width == 1:
            continue
        kind = shape.family, shape.inputs
        widest[kind] = max(widest.get(kind, 0), shape.loads, shape.stores)
        assert max(shape.loads, shape.stores) == 16 or shape.inputs > 8 or shape.narrow, name
        loads = _accesses(opcodes, "LDG", shape.loads)
        assert len(loads) >= min(shape.inputs, LOADS_IN_FLIGHT), name
        assert _most_together(opcodes, loads) >= min(shape.inputs, LOADS_IN_FLIGHT), name
        assert bool(_accesses(opcodes, "STG", shape.stores or 16)) == bool(shape.stores), name
    assert widest
    assert all(size == 16 for (_, inputs), size in widest.items() if inputs <= 8)
