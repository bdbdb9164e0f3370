"""Z-Image: captured before its final layer, named after the patch sizes; text tokens are part of the feature."""

from __future__ import annotations

from lesa_kernels.integrations.adapters import Adapter

Z_IMAGE = Adapter(
    "ZImageTransformer2DModel",
    capture="all_final_layer.2-1",
    blocks=("noise_refiner", "context_refiner", "layers"),
)
