"""Titans Video: train, tune and run video diffusion transformers."""

__version__ = "0.1.0"
