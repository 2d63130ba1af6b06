"""Files from and to a server: checkpoints, tokenizers."""
