"""One training run as its script sees it: its calls, in order."""
