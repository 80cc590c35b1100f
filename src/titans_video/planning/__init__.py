"""Plan a training run from its options: parameters, memory, time and disk; nothing is trained (layer 5)."""
