"""Text encoders: prompts to `TextCondition` (layer 1)."""
