"""Video files in and out: frames by timestamp, mp4, contact sheets, plots (layer 0)."""
