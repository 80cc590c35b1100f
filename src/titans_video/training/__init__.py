"""The trainer, checkpoints, validation and logs; the only importer of accelerate (layer 4)."""
