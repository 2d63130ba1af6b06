"""What fits a model: its renderer by its name, and its tokenizer."""

from pathlib import Path
from typing import Any

from mint._files.tokenizer_files import open_tokenizer, served_tokenizer
from mint.errors import MintError, refused
from mint_chat.names import get_recommended_renderer_name

__all__ = ["get_recommended_renderer_name", "get_tokenizer"]


def get_tokenizer(name: str) -> Any:
    """Opens a tokenizer: a folder's; else that of the server at MINT_BASE_URL, if it serves a base
    model of that name; else the hub's, or what is cached of it. Runs no remote code.
    """
    if Path(name).is_dir():
        return open_tokenizer(name)
    try:
        return served_tokenizer(name)
    except MintError as error:
        unserved = str(error)
    try:
        return open_tokenizer(name, local_files_only=False)
    except (OSError, ValueError) as error:
        raise refused(
            "name",
            f"is {name!r}, which is neither a folder here nor served ({unserved}), and came from "
            f"no hub ({_first_line(error)}); give a folder or a base model that is served",
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
