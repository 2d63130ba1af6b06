"""The adapters of the front: what a path means, its file, and a lease on its place in the engine."""
