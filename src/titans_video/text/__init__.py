"""Text encoders: prompts to `TextCondition` (floor L1)."""
