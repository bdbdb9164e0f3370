"""How good accelerated samples are, on small models that were trained here: `python -m benchmarks.quality`."""
