"""What scripts written for MinT import as `mint.mint`."""

from mint._version import __version__ as MINT_VERSION
from mint.mint import renderers

__all__ = ["MINT_VERSION", "apply_mint_patches", "renderers", "sync_env"]


def sync_env() -> None:
    """Does nothing: clients read the environment when they are made."""


def apply_mint_patches() -> None:
    """Does nothing: there is no other library to patch."""
