"""The mock world from end to end: write data, train, generate, score, report (layer 5)."""
