"""`python -m lesa_kernels.cli`, which `torchrun -m` can start too."""

from functools import partial

from lesa_command import run
from lesa_kernels.cli import app

run(lambda: partial(app, prog_name="lesa"))
