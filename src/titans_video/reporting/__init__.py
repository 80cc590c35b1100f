"""A run as one HTML page (layer 5)."""
