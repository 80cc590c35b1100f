"""A web page for the commands: data, training, runs and generation."""
