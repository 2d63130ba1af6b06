"""The process that owns the device: torch, and nothing of the network."""
