"""API keys for tests."""

from pathlib import Path

from mint_core.access.key_file import add_key


def make_key(tenant: str, file: Path, **fields: object) -> str:
    """A new key, whose line is in the file then. `fields`: of a Key."""
    return add_key(file, tenant, **fields)[0]
