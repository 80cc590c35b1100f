"""Proof that the memory is used, and what it costs; each module is a command: python -m benchmarks.memory.recall."""
