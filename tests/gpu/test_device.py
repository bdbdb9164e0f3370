"""The one skip of a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

import lesa_kernels
from lesa_kernels.backends.status_report import REFERENCE


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: neither tests/gpu nor the GPU half of tests/ops"
)
def test_a_kernel_serves_every_op_on_the_gpu() -> None:
    served = {kernel.op: kernel.kernel for kernel in lesa_kernels.status().kernels if kernel.device == "CUDA"}
    assert REFERENCE not in served.values(), served
