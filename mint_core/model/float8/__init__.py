"""Base models whose linear layers have float8 weights."""
