"""A small, guided diffusion transformer that draws colour emoji from the words of their Unicode names."""
