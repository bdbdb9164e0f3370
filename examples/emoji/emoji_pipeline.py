"""Wraps the emoji model as a diffusers pipeline that is guided as SD3's is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, SD3Transformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from examples.emoji import emoji_model as emoji


class EmojiPipeline(DiffusionPipeline):
    """Draws emoji; it is called as other pipelines are, with words of Unicode names for prompts.

    Args:
        transformer: the emoji model, see `load_model`.
        scheduler: SD3's.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SD3Transformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @classmethod
    def load(cls, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> EmojiPipeline:
        """Make the pipeline with the committed weights.

        Args:
            device: where the model goes.
            dtype: of its parameters.

        Returns:
            The pipeline.
        """
        return cls(emoji.load_model(device, dtype=dtype), emoji.scheduler())

    @property
    def guidance_scale(self) -> float:
        """The guidance of the latest call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the latest call had two branches."""
        return self._guidance_scale > 1

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = emoji.GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput:
        """Draw emoji.

        Args:
            prompt: words of Unicode names, or several such texts.
            negative_prompt: what the images are guided away from: one text, or as many as prompts; nothing by default.
            num_inference_steps: S.
            guidance_scale: u + scale (c - u), both branches in one call of the transformer; 1 is no guidance.
            generator: draws the noise; one for all images or one for each.
            latents: [B, 3, 32, 32], the noise, in place of drawing it.
            output_type: "pil" for pictures, anything else for the tensor.
            callback_on_step_end: called after each step with the pipeline, the step, its timestep and
                {"latents": tensor}; "latents" in what it returns takes their place.

        Returns:
            Its `images`: pictures, or [B, 3, 32, 32] from -1 to 1, not clamped.

        Raises:
            ValueError: when a prompt has a word that the model does not know, or the numbers of prompts, negative
                prompts and latents differ.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        self._guidance_scale = guidance_scale
        device, dtype = self._execution_device, self.transformer.dtype
        condition = emoji.guided_conditioning(prompts, guidance_scale, negative, device, dtype)
        shape = (len(prompts), emoji.CHANNELS, emoji.IMAGE_SIZE, emoji.IMAGE_SIZE)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        latents = latents.to(device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, t in enumerate(self.scheduler.timesteps):
                velocity = emoji.guided_velocity(self.transformer, latents, t, condition, guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, step, t, {"latents": latents}).pop("latents", latents)
                bar.update()
        self.maybe_free_model_hooks()
        if output_type != "pil":
            return ImagePipelineOutput(images=latents)
        return ImagePipelineOutput(images=[Image.fromarray(pixels.numpy()) for pixels in emoji.to_pixels(latents)])
