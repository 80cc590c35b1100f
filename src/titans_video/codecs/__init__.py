"""VAEs and other codecs: pixels to latents and back (floor L1)."""
