"""The ops in Triton, for devices that torch and Triton know and for which no compiled library of ours is there.

The functions have the signatures of `torch.ops.lesa` and the meaning of `lesa_kernels.ops.reference`; features are
float32, float16 or bfloat16. They check nothing: `lesa_kernels.backends` registers them behind the checks of
`lesa_kernels.ops`; tests and benchmarks may call them directly. Importing this package imports triton.
"""

from __future__ import annotations

from importlib import import_module

from lesa_kernels.ops import OPS

for _name, _op in OPS.items():
    globals()[_name] = getattr(import_module(f"{__name__}.{_op.family}"), _name)
