"""Wraps the digits model as a diffusers pipeline, to try on any machine what one does with a large model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from examples.digits.model import NUM_CLASSES, design_of, load_model, sample, scheduler


class DigitsPipeline(DiffusionPipeline):
    """Draws digits; it is called as other pipelines are, with digits for prompts.

    Args:
        transformer: the digits model, see `load_model`.
        scheduler: FLUX's.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @classmethod
    def load(cls, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DigitsPipeline:
        """Make the pipeline with the committed weights.

        Args:
            device: where the model goes.
            dtype: of its parameters.

        Returns:
            The pipeline.
        """
        return cls(load_model(device, dtype=dtype), scheduler())

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw digits.

        Args:
            prompt: a digit, or several.
            num_inference_steps: S.
            generator: draws the noise; one for all images or one for each.
            output_type: "pil" for pictures, anything else for the tensor.

        Returns:
            Its `images`: pictures, or [B, size, size] from -1 (paper) to 1 (ink), not clamped.

        Raises:
            ValueError: when a prompt is no digit.
        """
        digits = [prompt] if isinstance(prompt, str) else list(prompt)
        for digit in digits:
            if digit not in map(str, range(NUM_CLASSES)):
                raise ValueError(f"prompt must be a digit from 0 to {NUM_CLASSES - 1}, got {digit!r}")
        device = self._execution_device
        design = design_of(self.transformer)
        shape = (len(digits), design.num_tokens, design.token_size)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        labels = torch.tensor([int(digit) for digit in digits], device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            images = sample(
                self.transformer,
                noise,
                labels,
                num_inference_steps,
                scheduler=self.scheduler,
                progress=lambda done: bar.update(),
            )
        self.maybe_free_model_hooks()
        if output_type != "pil":
            return ImagePipelineOutput(images=images)
        paper_is_white = (0.5 - images.float() / 2).clamp(0, 1)
        return ImagePipelineOutput(images=self.numpy_to_pil(paper_is_white.unsqueeze(-1).cpu().numpy()))
