"""The base model: loading it, attention over packed documents, and the head."""
