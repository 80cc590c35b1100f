"""Noise processes, guidance and samplers; they know no network (layer 2)."""
