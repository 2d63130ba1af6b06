"""Texts and tokens of the served model, in a process of their own: `python -m mint_core.text`."""
