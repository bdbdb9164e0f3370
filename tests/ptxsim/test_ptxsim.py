"""The simulator on kernels with known results, and on kernels with planted faults, which it must find."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptxsim import Memory, Module, PtxError, bf16_to_f32, f32_to_bf16

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
THREADS = 256


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """The kernels of kernels.cu."""
    ptx = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    source = Path(__file__).with_name("kernels.cu")
    subprocess.run(["nvcc", "-ptx", "-arch=sm_90", "-O3", "-std=c++20", source, "-o", ptx], check=True)
    return Module(ptx.read_text())


def _history(memory: Memory, size: int) -> tuple[list[np.ndarray], bytes]:
    """Eight features in bfloat16, and the struct of pointers to them."""
    rng = np.random.default_rng(0)
    features = [f32_to_bf16(rng.standard_normal(size).astype(np.float32)) for _ in range(8)]
    return features, b"".join(memory.add(feature).to_bytes(8, "little") for feature in features)


@needs_nvcc
def test_a_struct_of_pointers_vectors_and_a_remainder(compiled: Module) -> None:
    memory, size = Memory(), 5003
    features, pointers = _history(memory, size)
    weight, bias, gain = (
        np.linspace(-1, 1, 8, dtype=np.float32),
        np.array([0.3], np.float32),
        np.array([0.7], np.float32),
    )
    out = np.full(size, 0x7FFF, np.uint16)
    arguments = [pointers, weight, bias, gain, out, np.int64(size)]
    assert compiled.launch("predict", (2,), (128,), arguments, memory=memory) > 0
    wide = np.stack([bf16_to_f32(feature) for feature in features]).astype(np.float64)
    np.testing.assert_allclose(bf16_to_f32(out), wide[-1] + gain * (weight @ wide + bias), rtol=2**-8, atol=1e-3)


@needs_nvcc
def test_a_parameter_that_is_indexed_at_run_time(compiled: Module) -> None:
    memory, out = Memory(), np.zeros(32, np.uint16)
    features, pointers = _history(memory, 32)
    compiled.launch("choose", (1,), (32,), [pointers, np.int32(3), out], memory=memory)
    np.testing.assert_array_equal(out, np.where(np.arange(32) % 2, features[4], features[3]))


@needs_nvcc
def test_shuffles_and_atomics_of_many_blocks(compiled: Module) -> None:
    x, y = np.random.default_rng(1).standard_normal(9000).astype(np.float32), np.zeros(1, np.float32)
    compiled.launch("reduce", (3,), (THREADS,), [x, y, np.int32(x.size)])
    np.testing.assert_allclose(y[0], (x * np.exp(-np.abs(x))).sum(dtype=np.float64), atol=1e-3)


@needs_nvcc
def test_atomics_on_dynamic_shared_memory_and_votes(compiled: Module) -> None:
    x, y = np.random.default_rng(2).integers(0, 4, THREADS, np.int32), np.zeros(12, np.int32)
    compiled.launch("count", (1,), (THREADS,), [x, y], shared_bytes=16)
    np.testing.assert_array_equal(y[:4], np.bincount(x, minlength=4))
    np.testing.assert_array_equal(y[4:], (x.reshape(8, 32) == 1).sum(1))
    with pytest.raises(PtxError, match="shared write out of bounds"):
        compiled.launch("count", (1,), (THREADS,), [x, y], shared_bytes=12)


@needs_nvcc
def test_branches_and_functions(compiled: Module) -> None:
    x, y, i = np.arange(THREADS, dtype=np.int32) % 9, np.zeros(THREADS, np.float32), np.arange(THREADS)
    compiled.launch("branches", (1,), (THREADS,), [x, y])
    table = np.array([0.5, 2, -3, 8])
    functions = [np.full(THREADS, 1.5), np.sqrt(2 + i), 1 / (i + 1), np.tanh(i * 0.01), np.log(i + 1), np.exp(i * 0.01)]
    cases = np.stack([*functions, table[i % 4], np.full(THREADS, -1), np.full(THREADS, -1)])
    np.testing.assert_allclose(y, cases[x, i], rtol=1e-5)


@needs_nvcc
def test_local_memory(compiled: Module) -> None:
    x, y = np.arange(32, dtype=np.int32) * 5 % 8, np.zeros(32, np.int32)
    compiled.launch("local", (1,), (32,), [x, y])
    np.testing.assert_array_equal(y, x * x)
    with pytest.raises(PtxError, match="local access out of bounds"):
        compiled.launch("local", (1,), (32,), [x + 1, y])


@needs_nvcc
def test_matrices(compiled: Module) -> None:
    x, y = np.arange(128, dtype=np.uint16), np.zeros(128, np.uint16)
    compiled.launch("matrices", (1,), (32,), [x, y])
    np.testing.assert_array_equal(y, np.concatenate([x[:64], x[64:].reshape(8, 8).T.reshape(-1)]))


@needs_nvcc
def test_a_warp_that_writes_what_it_read_is_no_race_unless_another_read_it(compiled: Module) -> None:
    y = np.zeros(32, np.float32)
    compiled.launch("reread", (1,), (64,), [y, np.int32(0)])
    np.testing.assert_array_equal(y, np.arange(32) + 1)
    with pytest.raises(PtxError, match="race: a write over another warp's access"):
        compiled.launch("reread", (1,), (64,), [y, np.int32(1)])
    compiled.launch("reread", (1,), (64,), [y, np.int32(1)], check_races=False)


FAULTS = {
    "writes_past_the_end": r"global write out of bounds: 1 thread\(s\), the first at byte 1024 \(\+4\) of an array of",
    "writes_nowhere": "address 0x.* is in no array|out of bounds",
    "reads_at_an_odd_address": "misaligned read of 8 bytes",
    "reads_what_another_warp_writes": "race: a read of another warp's write",
    "writes_what_another_warp_writes": "race: two warps write one byte",
    "reads_what_nothing_wrote": "read of shared memory that nothing wrote",
    "leaves_shared_memory": "shared write out of bounds",
    "misses_a_barrier": "different barriers",
    "shuffles_without_a_lane": "a divergent warp",
    "never_ends": "an endless loop",
    "traps": "the kernel trapped",
    "copies_in_bulk": "unknown instruction: cp.async.bulk",
}


@needs_nvcc
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(compiled: Module, name: str) -> None:
    with pytest.raises(PtxError, match=FAULTS[name]) as found:
        compiled.launch(name, (1,), (THREADS,), [np.arange(THREADS, dtype=np.float32)], most_steps=1000)
    assert f"in _Z{len(name)}{name}" in str(found.value)


@needs_nvcc
def test_an_observer_is_told_of_global_memory(compiled: Module) -> None:
    seen: list[tuple[Any, ...]] = []
    x, y = np.zeros(64, np.int32), np.zeros(64, np.int32)
    memory = Memory()
    compiled.launch("local", (2,), (64,), [x, y], memory=memory, observer=lambda *access: seen.append(access))
    read, write = seen
    assert [size for _, size, _, *_ in seen] == [4, 4] and not read[2] and write[2]
    np.testing.assert_array_equal(write[0] - memory.add(y), np.tile(np.arange(0, 256, 4), 2))
    np.testing.assert_array_equal(write[3], np.repeat([0, 1], 64))
    np.testing.assert_array_equal(write[5], np.tile(np.repeat([0, 1], 32), 2))


@needs_nvcc
def test_what_does_not_fit_is_refused(compiled: Module) -> None:
    y = np.zeros(THREADS, np.float32)
    with pytest.raises(KeyError, match="names 2 kernels"):
        compiled.kernel("writes_what_|reads_what_another")
    with pytest.raises(ValueError, match="takes 1 arguments, got 2"):
        compiled.launch("traps", (1,), (32,), [y, y])
    with pytest.raises(ValueError, match="holds 8 bytes, got 4"):
        compiled.launch("traps", (1,), (32,), [np.float32(1)])
    with pytest.raises(ValueError, match="1 to 1024 threads, got 1025"):
        compiled.launch("traps", (1,), (1025,), [y])
    with pytest.raises(ValueError, match="C-contiguous"):
        compiled.launch("traps", (1,), (32,), [y[::2]])
    with pytest.raises(KeyError, match="names 0 kernels"):
        Module(".version 8.0").kernel("any")


def _calculate(text: str, results: str, operands: list[np.ndarray]) -> np.ndarray:
    """Run one instruction in as many threads as operands have elements; %a, %b, %c and %d are its registers."""
    names = "abcd"[: len(operands)]
    parameters = ", ".join(f".param .u64 {name}" for name in (*names, "out"))
    loads = "".join(
        f"ld.param.u64 %p, [{name}]; mad.wide.u32 %p, %tid.x, {operand.itemsize}, %p;"
        f"ld.global.b{8 * operand.itemsize} %{name}, [%p];"
        for name, operand in zip(names, operands, strict=True)
    )
    out = np.zeros(operands[0].size, results)
    size = out.itemsize
    store = f"ld.param.u64 %p, [out]; mad.wide.u32 %p, %tid.x, {size}, %p; st.global.b{8 * size} [%p], %r;"
    module = Module(f".visible .entry calculate({parameters})\n{{ {loads} {text} {store} ret; }}")
    module.launch("calculate", (1,), (out.size,), [*operands, out])
    return out


WORDS = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0x00FF00FF], np.uint32)
COUNTS = np.array([0, 1, 4, 31, 32, 33, 64, 200], np.uint32)


def _pairs(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """Every element of one with every element of the other."""
    return [np.repeat(first, second.size), np.tile(second, first.size)]


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _signed_field(x: int, place: int, length: int) -> int:
    """The bits of a word from a place on, the last of them or the word's as the sign."""
    end = min(place + length, 32)
    return _signed(x & (1 << end) - 1, end) >> place if length else 0


BINARY: dict[str, Any] = {
    "shl.b32 %r, %a, %b;": lambda x, s: x << s if s < 32 else 0,
    "shr.u32 %r, %a, %b;": lambda x, s: x >> s,
    "shr.s32 %r, %a, %b;": lambda x, s: _signed(x) >> s,
    "shf.l.wrap.b32 %r, %a, 5, %b;": lambda x, s: (5 << 32 | x) << (s & 31) >> 32,
    "shf.r.clamp.b32 %r, %a, 5, %b;": lambda x, s: (5 << 32 | x) >> min(s, 32),
    "bfe.u32 %r, %a, 3, %b;": lambda x, n: x >> 3 & (1 << n) - 1,
    "bfe.s32 %r, %a, 3, %b;": lambda x, n: _signed_field(x, 3, n),
    "bfi.b32 %r, %a, 0, %b, 8;": lambda x, p: (x & 0xFF) << p,
    "mul.lo.u32 %r, %a, %b;": lambda x, y: x * y,
    "mul.hi.s32 %r, %a, %b;": lambda x, y: _signed(x) * _signed(y) >> 32,
    "mad.lo.s32 %r, %a, %b, 7;": lambda x, y: x * y + 7,
    "div.u32 %r, %a, %b;": lambda x, y: x // y if y else 0,
    "rem.s32 %r, %a, %b;": lambda x, y: int(np.fmod(_signed(x), _signed(y))) if y else 0,
    "div.s32 %r, %a, %b;": lambda x, y: int(_signed(x) / _signed(y)) if y else 0,
    "prmt.b32 %r, %a, %b, 0x5410;": lambda x, y: x & 0xFFFF | (y & 0xFFFF) << 16,
    "prmt.b32 %r, %a, %b, 0xba98;": lambda x, _: sum(0xFF << 8 * k for k in range(4) if x >> 8 * k + 7 & 1),
    "lop3.b32 %r, %a, %b, 0xF0F0F0F0, 0x96;": lambda x, y: x ^ y ^ 0xF0F0F0F0,
    "min.s32 %r, %a, %b;": lambda x, y: min(_signed(x), _signed(y)),
    "{ popc.b32 %r, %a; clz.b32 %s, %a; add.u32 %r, %r, %s; }": lambda x, _: x.bit_count() + 32 - x.bit_length(),
    "setp.lo.u32 %q, %a, %b; selp.b32 %r, %a, %b, %q;": lambda x, y: min(x, y),
    "setp.lt.s32 %q|%w, %a, %b; @%w mov.b32 %r, %a; @!%w mov.b32 %r, %b;": lambda x, y: max(_signed(x), _signed(y)),
}


@pytest.mark.parametrize("text", BINARY)
def test_instructions_on_integers(text: str) -> None:
    operands = _pairs(WORDS, np.concatenate([COUNTS, WORDS]) if text[:2] not in ("sh", "bf") else COUNTS)
    got = _calculate(text, "u4", operands)
    want = [BINARY[text](int(x), int(y)) & 0xFFFFFFFF for x, y in zip(*operands, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


REALS = np.array([0, -0.0, 0.5, 1.5, 2.5, -2.5, 3e38, 1e-40, np.inf, -np.inf, np.nan, 65519, 65520, 255.7], np.float32)
FLOATS: dict[str, tuple[str, Any]] = {
    "cvt.rni.s32.f32 %r, %a;": ("i4", lambda x: np.clip(np.nan_to_num(np.rint(x.astype(float))), -(2**31), 2**31 - 1)),
    "cvt.rzi.u8.f32 %r, %a;": ("u2", lambda x: np.clip(np.nan_to_num(np.trunc(x.astype(float))), 0, 255)),
    "cvt.rn.f16.f32 %r, %a;": ("f2", lambda x: x.astype(np.float16)),
    "cvt.rn.bf16.f32 %r, %a;": ("u2", f32_to_bf16),
    "cvt.f64.f32 %r, %a;": ("f8", lambda x: x.astype(np.float64)),
    "max.f32 %r, %a, 0f3F800000;": ("f4", lambda x: np.fmax(x, 1)),
    "max.NaN.f32 %r, %a, 0f3F800000;": ("f4", lambda x: np.maximum(x, 1)),
    "fma.rn.f32 %r, %a, 0f40000000, 0fBF800000;": ("f4", lambda x: (x.astype(float) * 2 - 1).astype(np.float32)),
    "fma.rm.f32 %r, %a, 0f3F800000, 0f4B400000;": ("f4", lambda x: np.floor(x.astype(float) + 12582912)),
    "neg.f32 %r, %a;": ("f4", lambda x: -x),
    "copysign.f32 %r, 0fBF800000, %a;": ("f4", lambda x: -np.abs(x)),
    "testp.notanumber.f32 %q, %a; selp.u32 %r, 1, 0, %q;": ("u4", np.isnan),
    "setp.leu.f32 %q, %a, 0f3F000000; selp.u32 %r, 1, 0, %q;": ("u4", lambda x: ~(x > 0.5)),
    "cvt.rn.bf16x2.f32 %r, %a, 0f3F800000;": ("u4", lambda x: f32_to_bf16(x).astype(np.uint32) << 16 | 0x3F80),
}


@pytest.mark.parametrize("text", FLOATS)
def test_instructions_on_floats(text: str) -> None:
    dtype, function = FLOATS[text]
    with np.errstate(all="ignore"):
        want = np.asarray(function(REALS)).astype(dtype)
    got = _calculate(text, dtype, [REALS])
    np.testing.assert_array_equal(got, want)
    if got.dtype.kind == "f":
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize(
    "text",
    ["add.sat.f32 %r, %a, %a;", "add.rz.f32 %r, %a, %a;", "cvt.rz.f16.f32 %r, %a;", "wgmma.mma_async %r, %a;"],
)
def test_a_variant_that_is_not_simulated_is_told(text: str) -> None:
    with pytest.raises(PtxError, match=f"unknown instruction: {text.rstrip(';')}"):
        _calculate(text, "f4", [REALS])


def test_a_register_that_nothing_wrote_is_told() -> None:
    with pytest.raises(PtxError, match="register %z is read before anything wrote it"):
        _calculate("mov.b32 %r, %z;", "u4", [WORDS])
