"""The trainer, losses, checkpoints and EMA; the only importer of accelerate (floor L3)."""
