"""Noise processes, guidance and samplers; they know no network (floor L2)."""
