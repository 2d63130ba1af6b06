"""Hosting of gRPC services: what trainer and sampler share on the network's side. No torch here."""
