"""Adapters in the front: what a path means, its row file, and a lease on it in the engine."""
