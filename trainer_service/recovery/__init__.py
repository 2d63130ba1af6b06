"""The state folder, and how runs come back from it."""
