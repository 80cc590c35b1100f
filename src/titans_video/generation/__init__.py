"""From a checkpoint and a prompt to a video (floor L3)."""
