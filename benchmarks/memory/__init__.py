"""Proof that the memory is used, and its cost. Each module is a command: python -m benchmarks.memory.recall."""
