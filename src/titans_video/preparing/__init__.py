"""Scan a manifest, fill the cache, write the data report (floor L3)."""
