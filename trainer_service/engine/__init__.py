"""The trainer's engine: torch, one thread, and nothing of the network."""
