"""The procedural world of moving shapes: its clips, its analyser, its data set (layer 1)."""
