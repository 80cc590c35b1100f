"""Networks: latents to `Prediction` (layer 1)."""
