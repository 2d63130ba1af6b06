"""Samples as their script asks for them and gets them."""
