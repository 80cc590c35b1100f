"""Networks: latents to `Prediction` (floor L1)."""
