"""`python -m lesa_kernels.cli`, which `torchrun -m` can start too."""

from lesa_kernels.cli import app

app(prog_name="lesa")
