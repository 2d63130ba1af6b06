"""Passes of few tokens, recorded in CUDA graphs: forward, losses and backward in one launch."""
