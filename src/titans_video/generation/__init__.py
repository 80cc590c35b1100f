"""From a checkpoint and a prompt to a video (layer 4)."""
