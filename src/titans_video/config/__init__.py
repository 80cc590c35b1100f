"""Command-line options: types, groups, rules and parsing; no torch (layer 0)."""
