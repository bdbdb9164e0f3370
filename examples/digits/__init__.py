"""A small diffusion transformer that draws digits, sampled with a fraction of its block calls: `make demo`."""
