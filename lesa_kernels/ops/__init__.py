"""The ops `torch.ops.lesa.*`. The file of a family holds their schemas, checks, references, fakes and autograd.

The reference is the meaning of an op: kernels are checked against it, and devices without a kernel run it. Letters: K
history length, N elements of a feature, M forecasts, S steps. Features are float32, float16, bfloat16 or, on the CPU,
float64; sums are kept in float32 (float64 for float64 features) and rounded once, at the end. A wrong argument is a
RuntimeError.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace

from lesa_kernels.ops.numerics import TOLERANCES, Tolerance
from lesa_kernels.ops.predict import predict_l1_loss
from lesa_kernels.ops.register import OPS, Op

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")  # a family declares its ops

reference = SimpleNamespace(**{name: op.reference for name, op in OPS.items()})
"""Name -> the function that defines an op, without the checks: it takes float64 on every device."""

__all__ = ["OPS", "TOLERANCES", "Op", "Tolerance", "predict_l1_loss", "reference"]
