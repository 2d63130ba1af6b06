"""Rows in memory of this host, where samplers find them at once."""
