"""The whole way at once on the mock world: make data, train, generate, score, show."""
