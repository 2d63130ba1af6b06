"""Layers that mix a sequence's tokens through a state of fixed size."""
