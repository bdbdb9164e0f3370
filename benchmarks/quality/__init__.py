"""Compares the images of all methods, on small models that it trains: `python -m benchmarks.quality`."""
