"""Examples: scripts for FLUX.1-dev, and a small diffusion transformer that draws digits."""
