"""A trainer's checkpoints from its host, for samplers of other hosts that share nothing with it."""
