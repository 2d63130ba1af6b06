"""Who computes next, and what waits."""
