"""Engines that share a sampler's requests: which of them gets one, and what is known of each."""
