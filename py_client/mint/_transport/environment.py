"""What the environment and the nearest `.env` say. Read when a client is constructed."""

import os
from dataclasses import dataclass

from dotenv import dotenv_values, find_dotenv

from mint.errors import refused

DEFAULT_BASE_URL = "127.0.0.1:50051"
DEFAULT_RANK = 16


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables that a client reads; empty where unset."""

    base_url: str  # MINT_BASE_URL
    api_key: str  # MINT_API_KEY
    base_model: str  # MINT_BASE_MODEL
    sampler_url: str  # MINT_SAMPLER_URL
    lora_rank: int  # MINT_LORA_RANK


def read_environment() -> Environment:
    """The variables of this process; where one is unset or empty, that of the `.env` of this folder
    or the nearest one above it. The process's own environment is never changed."""
    from_file = dotenv_values(find_dotenv(usecwd=True))

    def value(name: str) -> str:
        return (os.environ.get(name) or from_file.get(name) or "").strip()

    return Environment(
        base_url=value("MINT_BASE_URL"),
        api_key=value("MINT_API_KEY"),
        base_model=value("MINT_BASE_MODEL"),
        sampler_url=value("MINT_SAMPLER_URL"),
        lora_rank=_rank(value("MINT_LORA_RANK")),
    )


def _rank(text: str) -> int:
    if not text:
        return DEFAULT_RANK
    if not text.isdecimal() or not int(text):
        raise refused("MINT_LORA_RANK", f"is {text!r}; set it to a whole number of at least 1")
    return int(text)
