"""Connections, calls and attempts."""
