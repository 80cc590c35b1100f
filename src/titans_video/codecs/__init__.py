"""VAEs and other codecs: pixels to latents and back (layer 1)."""
