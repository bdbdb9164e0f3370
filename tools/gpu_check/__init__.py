"""Checks and measures on a machine with a GPU, and writes a report: `make gpu-check`."""
