"""Scripts that train and generate; see their --help."""
