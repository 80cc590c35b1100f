"""A run as one HTML page (floor L3)."""
