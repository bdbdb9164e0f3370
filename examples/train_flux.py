"""Train a LESA predictor for FLUX.1-dev while it samples. Needs its weights and a GPU with 40 GB of memory.

Several GPUs: torchrun --nproc-per-node 4 examples/train_flux.py --prompts prompts.txt --batch 4
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxPipeline

import lesa_kernels as lesa
from lesa_kernels.files import read_lines
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.training import TrainingConfig, train


def main() -> None:
    """Train, or go on where it was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="a text file with a prompt a line")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interval", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1, help="runs at once, over all GPUs")
    parser.add_argument("--out", default="flux-predictor")
    arguments = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to(device)
    prompts = read_lines(arguments.prompts)
    source = PipelineSource(pipe, prompts, steps=arguments.steps)
    torch.manual_seed(0)
    predictor = lesa.LesaPredictor(num_steps=arguments.steps).to(device)
    schedule = lesa.Schedule.interval(arguments.steps, arguments.interval)
    result = train(
        predictor, source, schedule, replace(TrainingConfig.tuned(), batch_size=arguments.batch), out=arguments.out
    )
    print(f"{result.updates} updates in {result.seconds:.0f} s; try it: examples/flux.py --predictor {arguments.out}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
