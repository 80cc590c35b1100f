"""Manifest rows, planning, buckets, the sampler and the store of cached encodings (floor L1)."""
