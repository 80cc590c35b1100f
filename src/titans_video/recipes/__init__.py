"""One file for each recipe: it builds the parts of a run and passes them to the trainer (layer 5)."""
