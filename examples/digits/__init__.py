"""A small diffusion transformer that draws digits; `python -m examples.digits.train_model` trains it."""
