"""How a service starts, is configured, and ends; the keys of its callers."""
