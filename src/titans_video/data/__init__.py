"""Manifests, clip planning, buckets, the sampler and the cache of encodings (layer 1)."""
