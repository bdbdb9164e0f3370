"""Examples: scripts for FLUX.1-dev, and small diffusion transformers that draw digits and emoji."""
