"""The sampler: generates from a base model and from adapters on it."""
