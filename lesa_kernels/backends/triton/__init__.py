"""The ops in Triton, for devices that torch and Triton know and for which no compiled library of ours is there.

The functions have the signatures of `torch.ops.lesa` and the meaning of `lesa_kernels.ops.reference`; features are
float32, float16 or bfloat16. They check nothing: `lesa_kernels.backends` registers them behind the checks of
`lesa_kernels.ops`; tests and benchmarks may call them directly. Importing this package imports triton.
"""

from __future__ import annotations

from lesa_kernels.backends.triton.forecast import forecast, forecast_into, push
from lesa_kernels.backends.triton.gram import gram
from lesa_kernels.backends.triton.identity import identity
from lesa_kernels.backends.triton.kan import kan_linear, kan_linear_backward
from lesa_kernels.backends.triton.predict import predict, predict_backward, predict_l1

__all__ = [
    "forecast",
    "forecast_into",
    "gram",
    "identity",
    "kan_linear",
    "kan_linear_backward",
    "predict",
    "predict_backward",
    "predict_l1",
    "push",
]
