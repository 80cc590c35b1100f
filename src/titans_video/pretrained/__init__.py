"""Pretrained video models: what each expects of latents, prompts and positions (layer 3)."""
