"""What an object store needs: its keys, its revisions, copies of its files."""
