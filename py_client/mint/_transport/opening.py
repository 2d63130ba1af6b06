"""How clients come to their servers: what was given, or what the environment says."""

import math
import os
from collections.abc import Mapping

from dotenv import dotenv_values, find_dotenv

from mint._transport.address import parse_address
from mint._transport.connection import Settings
from mint._transport.servers import Servers
from mint._transport.tls import TlsFiles
from mint.errors import refused
from mint.types._checks import number, text, text_map

DEFAULT_BASE_URL = "127.0.0.1:50051"
DEFAULT_RANK = 16
DEFAULT_TIMEOUT_S = 3600.0
VARIABLES = (
    "MINT_BASE_URL",
    "MINT_API_KEY",
    "MINT_BASE_MODEL",
    "MINT_SAMPLER_URL",
    "MINT_LORA_RANK",
    "MINT_TLS_CA",
    "MINT_TLS_CERT",
    "MINT_TLS_KEY",
    "MINT_ALLOW_INSECURE",
)


def open_servers(
    base_url: str | None,
    api_key: str | None,
    timeout: float | None,
    default_headers: Mapping[str, str] | None,
) -> tuple[dict[str, str], Servers]:
    """Reads the environment. Nothing is sent yet."""
    environment = read_environment()
    settings = Settings(
        api_key=text(api_key or environment["MINT_API_KEY"], "api_key").strip(),
        headers=text_map(default_headers, "default_headers"),
        tls=TlsFiles(
            ca=environment["MINT_TLS_CA"],
            cert=environment["MINT_TLS_CERT"],
            key=environment["MINT_TLS_KEY"],
        ),
        allow_insecure=environment["MINT_ALLOW_INSECURE"].lower() in ("1", "true", "yes"),
        timeout_s=_timeout(timeout),
    )
    url = base_url or environment["MINT_BASE_URL"] or DEFAULT_BASE_URL
    address = parse_address(text(url, "base_url"), "base_url")
    return environment, Servers(address, settings, environment["MINT_SAMPLER_URL"])


def read_environment() -> dict[str, str]:
    """The variables of this process; where one is unset or empty, that of the `.env` of this folder
    or the nearest one above it. The process's own environment is never changed. A variable that is
    set nowhere is empty, but for the rank."""
    from_file = dotenv_values(_trusted(find_dotenv(usecwd=True)))
    found = {
        name: (os.environ.get(name) or from_file.get(name) or "").strip() for name in VARIABLES
    }
    rank = found["MINT_LORA_RANK"] = found["MINT_LORA_RANK"] or str(DEFAULT_RANK)
    if not rank.isdecimal() or not int(rank):
        raise refused("MINT_LORA_RANK", f"is {rank!r}; set it to a whole number of at least 1")
    return found


def _trusted(file: str) -> str:
    """Refuses a file of neither this user, the folder's owner nor root: whoever may write into a
    folder above, such as /tmp, could have keys sent to a server of his.
    """
    if not file or not hasattr(os, "getuid"):  # a system without owners of files
        return file
    if os.stat(file).st_uid not in (0, os.getuid(), os.stat(".").st_uid):
        raise refused(
            file,
            "belongs to another user, who could have your key sent to his own server; put a `.env` "
            "of your own, which may be empty, into the folder in which you run",
        )
    return file


def _timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    seconds = number(timeout, "timeout")
    if math.isnan(seconds) or seconds <= 0:
        raise refused("timeout", f"is {timeout}; give a positive number of seconds")
    return seconds
