"""Flags and exit codes (floor L5)."""
