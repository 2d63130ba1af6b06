"""What the trainer has promised, on disk: see docs/durability.md."""
