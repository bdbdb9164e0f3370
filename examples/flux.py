"""Sample FLUX.1-dev plainly and accelerated, and save both images. Needs its weights and a GPU with 40 GB of memory."""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import FluxPipeline

import lesa_kernels as lesa


def main() -> None:
    """Run both and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="a lighthouse in a storm, oil on canvas")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--predictor", help="folder or hub id of a saved predictor; without, TaylorSeer in sigma")
    arguments = parser.parse_args()

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")

    def sample(name: str) -> None:
        begin = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(0)
        image = pipe(arguments.prompt, num_inference_steps=arguments.steps, generator=generator).images[0]
        image.save(f"{name}.png")
        print(f"{name}.png: {time.perf_counter() - begin:.1f} s")

    sample("plain")
    if arguments.predictor:
        lesa.enable(pipe, lesa.load_predictor(arguments.predictor))
    else:
        lesa.enable(pipe)
    sample("accelerated")
    print(lesa.summary(pipe))


if __name__ == "__main__":
    main()
