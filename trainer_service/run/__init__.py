"""One training run: its calls, its order, its life."""
