"""Scripts to train and to generate with; see their --help."""
