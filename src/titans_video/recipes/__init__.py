"""One short file each: builds the parts of a run and hands them to the trainer (floor L4)."""
