"""The demo: a small real diffusion transformer, sampled with a fraction of its block calls."""
