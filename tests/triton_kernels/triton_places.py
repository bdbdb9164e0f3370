"""Where Triton's kernels can run here. Imports no triton, so that these tests can be skipped where it is missing."""

from __future__ import annotations

from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()
PTXSIM = Path(__file__).resolve().parents[3] / "shared" / "ptxsim" / "ptxsim.py"
