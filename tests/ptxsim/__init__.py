"""Runs the PTX of a compiled kernel without a GPU: thread by thread, on NumPy arrays, with every access checked.

It executes the text that nvcc (`nvcc -ptx -arch=sm_90`) or Triton (`compiled.asm["ptx"]`) produced. It says nothing
about speed, and a GPU stays the last word.

    module, out = Module(path.read_text()), np.full(n, np.nan, np.float32)
    module.launch("predict_kernel", grid=(4,), block=(256,), arguments=[x, out, np.float32(2), np.int64(n)])

Arguments are arrays (pointers; a kernel writes into the arrays themselves), NumPy scalars (by value), `bytes` (structs
as C lays them out; `Memory.add` returns addresses to pack into them) and None (a null pointer). Arrays of bfloat16
hold bits in uint16. Triton appends two pointers that may be null; its metadata name the `shared_bytes`.

`PtxError` is raised for an access that is misaligned or out of bounds, a read of shared memory that nothing wrote, a
race between warps in shared memory, a barrier that a part of a block misses, a `.sync` instruction in a divergent warp,
an endless loop, and an instruction that is not simulated: bulk copies, matrix products, clusters, atomics on 16-bit
floats, textures, calls. Races in global memory are found by `GlobalAccesses`. `fma` rounds to double and then to its
type, `ex2.approx` and its like are exact: compare with a tolerance.
"""

from ptxsim.memory import Memory
from ptxsim.module import Module
from ptxsim.races import GlobalAccesses
from ptxsim.values import PtxError, bf16_to_f32, f32_to_bf16

__all__ = ["GlobalAccesses", "Memory", "Module", "PtxError", "bf16_to_f32", "f32_to_bf16"]
