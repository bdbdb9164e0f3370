"""The CUDA kernels without a GPU: nvcc's PTX for sm_90, run by the simulator `ptxsim` and compared with float64.

The host side runs as well, with cuda_without_gpu.cpp in place of the CUDA runtime: it picks the kernel, fills its task
and asks for a launch, which is simulated. Speed is not what this tells.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lesa_kernels.reference import TOLERANCES

REPOSITORY = Path(__file__).resolve().parents[2]
PTXSIM = REPOSITORY.parent / "shared" / "ptxsim" / "ptxsim.py"
SOURCES = ("combine_float32", "combine_float16", "combine_bfloat16", "copy")
DTYPES = ("float32", "float16", "bfloat16")
# Registers per thread that let two blocks of 256 threads share a multiprocessor.
MOST_REGISTERS = 128


@functools.cache
def simulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxsim", PTXSIM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxsim"] = module
    spec.loader.exec_module(module)
    return module


def number_type(dtype: str) -> Any:
    return {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        bits: np.ndarray = simulator().f32_to_bf16(values.astype(np.float32))
        return bits.astype(np.uint16)
    return values.astype(number_type(dtype))


def decode(values: np.ndarray, dtype: str) -> np.ndarray:
    wide: np.ndarray = simulator().bf16_to_f32(values) if dtype == "bfloat16" else values
    return wide.astype(np.float64)


@dataclass
class Array:
    """A tensor in simulated memory: a view of a larger storage, strides in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def view(self) -> np.ndarray:
        size = self.storage.itemsize
        return np.lib.stride_tricks.as_strided(
            self.storage[self.offset :], self.shape, tuple(size * stride for stride in self.strides)
        )

    @property
    def values(self) -> np.ndarray:
        return decode(self.view, self.dtype)

    def untouched(self) -> int:
        """How many elements of the storage are still poison."""
        return int(np.isnan(decode(self.storage, self.dtype)).sum())


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[d + 1 :])) for d in range(len(shape)))


def place(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: str) -> Array:
    """An array of poison: NaN everywhere, between its elements too."""
    length = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return Array(encode(np.full(length, np.nan), dtype), offset, shape, strides, dtype)


def contiguous(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape), 0, dtype)


def misaligned(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape), 1, dtype)


def padded(shape: tuple[int, ...], dtype: str) -> Array:
    """Rows with a gap of 8 elements between them, aligned to vectors."""
    return place(shape, row_major((*shape[:-1], shape[-1] + 8)), 8, dtype)


def transposed(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape[::-1])[::-1], 0, dtype)


def sparse(shape: tuple[int, ...], dtype: str) -> Array:
    """Gaps between all elements and more between rows: no two dimensions merge."""
    strides = [2]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size + 1)
    return place(shape, tuple(strides), 1, dtype)


def filled(array: Array, rng: np.random.Generator) -> Array:
    array.view[...] = encode(rng.standard_normal(array.shape), array.dtype)
    return array


class Source(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.POINTER(ctypes.c_int64)))


class Values(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("is_float", ctypes.c_bool),
    )


def integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class Gpu:
    """The host library, whose launches are simulated on the memory of one test."""

    def __init__(self, library: Path, ptx: Sequence[Path], report: str) -> None:
        self.report = report
        self.launches: list[str] = []
        self._memory: Any = None
        self._error: BaseException | None = None
        self._library = ctypes.CDLL(str(library))
        self._library.run_combine.restype = self._library.run_copy.restype = ctypes.c_char_p
        callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._launch)
        self._library.on_launch(self._callback)
        parts = [part for path in ptx for part in re.split(r"\.entry ", path.read_text())[1:]]
        self._ptx = {re.match(r"\w+", part)[0]: part for part in parts}  # type: ignore[index]
        self._modules: dict[str, tuple[Any, int]] = {}

    def _module(self, kernel: str) -> tuple[Any, int]:
        """The simulator's module for a kernel and the size of its task.

        The simulator does not know parameters that are indexed at run time. So the task goes to global memory, where
        reads are checked as well, and the kernel gets its address.
        """
        if kernel not in self._modules:
            text = self._ptx[kernel]
            name = f"{kernel}_param_0"
            size = re.search(rf"\.param \.align \d+ \.b8 {name}\[(\d+)\]", text)
            assert size is not None
            head, brace, body = text.partition("{")
            head = head.replace(size[0], f".param .u64 {name}")
            body = body.replace("ld.param.", "ld.global.").replace(name, "%task")
            text = f".entry {head}{brace}\nld.param.u64 %task, [{name}];\n{body}"
            self._modules[kernel] = simulator().Module(text), int(size[1])
        return self._modules[kernel]

    def _launch(self, kernel: bytes, blocks: int, threads: int, task: int) -> None:
        try:
            module, size = self._module(kernel.decode())
            module.memory = self._memory
            self.launches.append(kernel.decode())
            module.launch(
                kernel.decode(), (blocks,), (threads,), [np.frombuffer(ctypes.string_at(task, size), np.uint8)]
            )
        except BaseException as error:
            self._error = error

    def _start(self) -> None:
        self._memory, self._error, self.launches = simulator().Memory(), None, []

    def _finish(self, message: bytes) -> None:
        if self._error is not None:
            raise self._error
        if message:
            raise RuntimeError(message.decode())

    def _source(self, array: Array) -> Source:
        address = self._memory.add(array.storage) + array.offset * array.storage.itemsize
        return Source(address, integers(array.strides))

    def _values(self, array: Array | None) -> Values:
        if array is None:
            return Values(None, 0, 0, False)
        row, column = array.strides
        return Values(self._source(array).data, row, column, array.dtype == "float32")

    def combine(
        self, inputs: Sequence[Array], outputs: Sequence[Array], coefficients: Array, offsets: Array, gain: Array | None
    ) -> None:
        self._start()
        tensors, parameters = [*inputs, *outputs], (coefficients, offsets, gain)
        sources = (Source * len(tensors))(*map(self._source, tensors))
        values = (Values * 3)(*map(self._values, parameters))
        dtype, shape = inputs[0].dtype, inputs[0].shape
        sizes = integers(shape)
        self._finish(
            self._library.run_combine(dtype.encode(), len(shape), sizes, len(inputs), len(tensors), sources, values)
        )

    def copy(self, to: Array, source: Array) -> None:
        self._start()
        sources = (Source * 2)(self._source(to), self._source(source))
        arguments = (to.dtype.encode(), source.dtype.encode(), len(to.shape), integers(to.shape), sources)
        self._finish(self._library.run_copy(*arguments))

    def fail_launches(self, error: int) -> None:
        self._library.fail_launches(error)


def run(command: Sequence[str | Path], folder: Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    if not PTXSIM.exists():
        pytest.skip(f"the PTX simulator is not at {PTXSIM}")
    folder = tmp_path_factory.mktemp("cuda")
    common: list[str | Path] = [nvcc, "-std=c++20", f"-I{REPOSITORY / 'csrc'}", "-Xcompiler=-fPIC", "-cudart=none"]
    flags: list[str | Path] = ["--expt-relaxed-constexpr", "-arch=sm_90", "-Xptxas=-v", "--keep", "--keep-dir", folder]
    report = ""
    for source in SOURCES:
        path = REPOSITORY / "csrc" / "cuda" / f"{source}.cu"
        report += run([*common, *flags, "-c", path, "-o", f"{source}.o"], folder)
    stand_in = Path(__file__).with_name("cuda_without_gpu.cpp")
    objects = [f"{source}.o" for source in SOURCES]
    run([*common, "-shared", "-Xlinker=-Bsymbolic,-z,defs", stand_in, *objects, "-o", "kernels.so"], folder)
    return Gpu(folder / "kernels.so", [folder / f"{source}.ptx" for source in SOURCES], report)


Layout = Callable[[tuple[int, ...], str], Array]


def parameters(shape: tuple[int, int], dtype: str, rng: np.random.Generator) -> Array:
    return filled(contiguous(shape, dtype), rng)


def expected(
    inputs: Sequence[Array], coefficients: Array, offsets: Array, gain: Array | None
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [M, *feature] in float64, and the sum of the magnitudes of their terms."""
    results = []
    for change in (lambda values: values, np.abs):
        h, c, d = (
            change(values) for values in (np.stack([i.values for i in inputs]), coefficients.values, offsets.values)
        )
        sums = np.tensordot(c, h, axes=1) + d.reshape(-1, *[1] * (h.ndim - 1))
        results.append(sums if gain is None else h[-1] + change(gain.values).item() * sums)
    return results[0], results[1]


def check_combine(
    gpu: Gpu,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    rng: np.random.Generator,
    parameter_dtypes: Sequence[str] = ("float32", "float32", "float32"),
    predicts: bool = False,
) -> None:
    rows, columns = len(outputs), len(inputs)
    coefficients = parameters((rows, columns), parameter_dtypes[0], rng)
    offsets = parameters((1, rows), parameter_dtypes[1], rng)
    gain = parameters((1, 1), parameter_dtypes[2], rng) if predicts else None
    want, scale = expected(inputs, coefficients, offsets, gain)
    gpu.combine(inputs, outputs, coefficients, offsets, gain)
    tolerance = TOLERANCES[getattr(torch, inputs[0].dtype)]
    for m, output in enumerate(outputs):
        error = np.abs(output.values - want[m])
        assert not np.isnan(error).any(), "an element was not written"
        assert (error <= tolerance.absolute + tolerance.relative * scale[m]).all()


def check_functional(
    gpu: Gpu, dtype: str, shape: tuple[int, ...], layout: Layout, history: int, rows: int, **options: Any
) -> None:
    rng = np.random.default_rng(0)
    inputs = [filled(layout(shape, dtype), rng) for _ in range(history)]
    outputs = [contiguous(shape, dtype) for _ in range(rows)]
    check_combine(gpu, inputs, outputs, rng, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 255, 1000])
def test_odd_sizes(gpu: Gpu, dtype: str, size: int) -> None:
    check_functional(gpu, dtype, (size,), contiguous, history=4, rows=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [1, 2, 3])
def test_threads_loop_over_large_features(gpu: Gpu, dtype: str, history: int) -> None:
    """Two blocks of 256 threads for more than 1,024 vectors and a rest."""
    check_functional(gpu, dtype, (8803,), contiguous, history, rows=2)
    assert len(gpu.launches) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("history", "rows"), [(1, 1), (1, 4), (2, 1), (8, 8), (9, 2), (32, 1), (64, 64)])
def test_forecast_counts(gpu: Gpu, dtype: str, history: int, rows: int) -> None:
    check_functional(gpu, dtype, (264,), contiguous, history, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [1, 4, 8, 13, 64])
def test_predict(gpu: Gpu, dtype: str, history: int) -> None:
    check_functional(gpu, dtype, (136,), contiguous, history, rows=1, predicts=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", [(True, False, False), (False, True, True), (True, True, True)])
def test_each_parameter_has_its_own_dtype(gpu: Gpu, dtype: str, own: tuple[bool, bool, bool]) -> None:
    dtypes = [dtype if flag else "float32" for flag in own]
    check_functional(gpu, dtype, (64,), contiguous, history=4, rows=1, parameter_dtypes=dtypes, predicts=True)


def test_strided_parameters(gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    inputs = [filled(contiguous((40,), "bfloat16"), rng) for _ in range(3)]
    outputs = [contiguous((40,), "bfloat16") for _ in range(2)]
    coefficients = filled(place((2, 3), (2, 5), 1, "float32"), rng)
    offsets = filled(place((1, 2), (0, 7), 0, "bfloat16"), rng)
    want, scale = expected(inputs, coefficients, offsets, None)
    gpu.combine(inputs, outputs, coefficients, offsets, None)
    for m, output in enumerate(outputs):
        assert (np.abs(output.values - want[m]) <= 4.5e-3 * scale[m]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [misaligned, padded, transposed, sparse])
@pytest.mark.parametrize(("history", "rows"), [(4, 2), (20, 1)])
def test_any_strides_and_offsets(gpu: Gpu, dtype: str, layout: Layout, history: int, rows: int) -> None:
    check_functional(gpu, dtype, (5, 16), layout, history, rows)


def test_more_dimensions_than_a_kernel_walks(gpu: Gpu) -> None:
    check_functional(gpu, "float16", (2, 2, 3, 2, 2, 3), sparse, history=2, rows=2)
    assert len(gpu.launches) == 4


@pytest.mark.parametrize(
    ("layout", "history", "shape", "kernel"),
    [
        (contiguous, 4, (1000,), "Li4ELi8ELb0E"),
        (contiguous, 8, (3, 16), "Li8ELi8ELb0E"),
        (contiguous, 16, (64,), "Li16ELi4ELb0E"),
        (contiguous, 32, (64,), "Li32ELi2ELb0E"),
        (contiguous, 33, (64,), "Li64ELi1ELb1E"),
        (padded, 4, (5, 16), "Li8ELi8ELb1E"),
        (padded, 4, (5, 12), "Li8ELi1ELb1E"),
        (misaligned, 4, (1000,), "Li8ELi1ELb1E"),
        (transposed, 4, (8, 16), "Li8ELi1ELb1E"),
    ],
)
def test_which_kernel_runs(gpu: Gpu, layout: Layout, history: int, shape: tuple[int, ...], kernel: str) -> None:
    """Template arguments in the name: inputs, elements of a vector, strided or not."""
    check_functional(gpu, "bfloat16", shape, layout, history, rows=1)
    assert len(gpu.launches) == 1
    assert kernel in gpu.launches[0]


@pytest.mark.parametrize(("size", "stride", "width"), [(16, 24, 8), (12, 24, 1), (16, 20, 1)])
def test_rows_take_vectors_only_where_sizes_and_strides_allow(gpu: Gpu, size: int, stride: int, width: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [place((5, size), (stride, 1), 0, "bfloat16") for _ in range(4)]
    inputs = [filled(array, rng) for array in arrays[:3]]
    check_combine(gpu, inputs, arrays[3:], rng)
    assert arrays[3].untouched() == 4 * (stride - size)
    assert [f"Li8ELi{width}ELb1E" in kernel for kernel in gpu.launches] == [True]
    gpu.copy(arrays[3], arrays[0])
    assert (arrays[3].view == arrays[0].view).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [4, 8, 12, 40])
@pytest.mark.parametrize("gap", [0, 3])
def test_outputs_may_take_the_place_of_inputs(gpu: Gpu, dtype: str, history: int, gap: int) -> None:
    """A ring of history + 2 slots, rows repeated among what is read; slots that are not written keep their bits."""
    rng = np.random.default_rng(0)
    size, slots = 40, history + 2
    ring = filled(place((slots, size), (size + gap, 1), 0, dtype), rng)
    slot = [Array(ring.storage, s * (size + gap), (size,), (1,), dtype) for s in range(slots)]
    read = [*range(1, history), 1]
    write = [2, 0, history - 1, history]
    before = ring.storage.copy()
    inputs = [slot[s] for s in read]
    check_combine(gpu, inputs, [slot[s] for s in write], rng)
    for s in set(range(slots)) - set(write):
        assert (slot[s].view == before[slot[s].offset :][:size]).all()
    assert ring.untouched() == gap * (slots - 1)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize(
    ("layout", "shape"), [(contiguous, (8803,)), (padded, (3, 16)), (sparse, (3, 7)), (misaligned, (9,))]
)
def test_copy(gpu: Gpu, to: str, source: str, layout: Layout, shape: tuple[int, ...]) -> None:
    array = filled(contiguous(shape, source), np.random.default_rng(0))
    result = layout(shape, to)
    gaps = result.storage.size - int(np.prod(shape))
    gpu.copy(result, array)
    assert (result.view == encode(array.values, to)).all()
    assert result.untouched() == gaps


def test_copy_converts_the_extremes(gpu: Gpu) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, 65504.0, 65520.0, 1e-7, 6e-8, 3e38, -1e-40], np.float32)
    array = Array(values, 0, values.shape, (1,), "float32")
    for dtype in ("float16", "bfloat16"):
        result = contiguous(values.shape, dtype)
        gpu.copy(result, array)
        with np.errstate(over="ignore"):
            want = encode(values, dtype)
        assert (result.storage.view(np.uint16) == want.view(np.uint16)).all()


def test_copy_of_one_dtype_keeps_the_bits_of_a_nan(gpu: Gpu) -> None:
    bits = np.array([0x7C01, 0xFE55, 0x3C00], np.uint16)
    array = Array(bits.view(np.float16), 0, (3,), (1,), "float16")
    result = contiguous((3,), "float16")
    gpu.copy(result, array)
    assert (result.storage.view(np.uint16) == bits).all()


def test_a_nan_is_not_lost_to_a_coefficient_of_zero(gpu: Gpu) -> None:
    feature, result = contiguous((16,), "float32"), contiguous((16,), "float32")
    feature.storage[:] = 1
    feature.storage[3] = np.nan
    zero = Array(np.zeros(1, np.float32), 0, (1, 1), (1, 1), "float32")
    gpu.combine([feature], [result], zero, zero, None)
    assert np.isnan(result.storage).nonzero()[0].tolist() == [3]


def test_no_elements_is_no_launch(gpu: Gpu) -> None:
    check_functional(gpu, "float32", (3, 1), contiguous, history=2, rows=1)
    one = parameters((1, 1), "float32", np.random.default_rng(0))
    empty = Array(np.zeros(8, np.float32), 0, (0, 4), (4, 1), "float32")
    gpu.combine([empty], [empty], one, one, None)
    gpu.copy(empty, empty)
    assert gpu.launches == []


def test_a_refused_launch_is_an_error_that_names_the_op(gpu: Gpu) -> None:
    gpu.fail_launches(209)
    try:
        with pytest.raises(RuntimeError, match=r"^lesa::test: CUDA error: the launch was refused$"):
            check_functional(gpu, "float32", (8,), contiguous, history=1, rows=1)
    finally:
        gpu.fail_launches(0)


def test_kernels_stay_in_registers(gpu: Gpu) -> None:
    """What ptxas reports for sm_90: no stack, no spills, and no more registers than two resident blocks allow."""
    kernels = re.findall(r"Compiling entry function '(\w+)'", gpu.report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", gpu.report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", gpu.report)]
    assert len(kernels) == len(frames) == len(registers) > 0
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MOST_REGISTERS
