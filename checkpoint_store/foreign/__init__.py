"""Adapters that others have made: checked as strangers' files are, and converted."""
