"""Engines among which runs are spread: which run is where, and when it goes elsewhere."""
