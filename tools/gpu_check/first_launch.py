"""Runs one op on a device and prints which kernels serve; ends with status 1 unless compiled kernels do."""

from __future__ import annotations

import json
import sys

import torch

import lesa_kernels


def main(device: str) -> None:
    """Print the GPU's architecture, `lesa.status()`, and the result of one call."""
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit(f"torch {torch.__version__} finds no CUDA device here")
        major, minor = torch.cuda.get_device_capability()
        print(json.dumps({"architecture": f"{major}{minor}-real"}))
    status = lesa_kernels.status()
    print(status)
    missing = [k for k in status.kernels if k.device == device.upper() and not k.kernel.startswith(("CUDA", "C++"))]
    if missing:
        sys.exit("\n".join(f"{kernel.op} is served by {kernel.kernel}: {kernel.reason}" for kernel in missing))
    history = [torch.full((8,), float(k), device=device) for k in (1, 2)]
    weight, bias, gain = (torch.tensor(values, device=device) for values in ([3.0, 4.0], [5.0], [6.0]))
    got = torch.ops.lesa.predict(history, weight, bias, gain).tolist()
    if got != [2.0 + 6.0 * (3.0 + 8.0 + 5.0)] * 8:
        sys.exit(f"lesa::predict must return 98 eight times, got {got}")
    print("lesa::predict is right")


if __name__ == "__main__":
    main(sys.argv[1])
