"""Flags and exit codes of every command (layer 6)."""
