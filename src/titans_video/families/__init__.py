"""Pretrained families of video transformers: what each expects of latents, prompts and positions (floor L2)."""
