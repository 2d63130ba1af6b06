"""The command line of `python -m mint_core.hosting.serve`: which flag goes to which service."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

from mint_core.addresses import host_and_port
from mint_core.errors import InvalidRequest
from mint_core.hosting.settings import Settings
from mint_core.rpc.hosting import Role

SAMPLER_PORT = 50052  # where clients look for the sampler unless the trainer says otherwise

HELP = """Starts trainer and sampler, says where they listen, and stops both on Ctrl-C. An option
--trainer-X goes to the trainer as --X, --sampler-X to the sampler, and any other to both, such as
--store FOLDER or --config FILE; --trainer-help and --sampler-help list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    trainer: tuple[str, ...]
    sampler: tuple[str, ...]
    sampler_address: str  # that the trainer must tell; empty: none, clients find it by themselves
    ready_file: Path | None


def parse_serve_flags(argv: Sequence[str]) -> ServeFlags:
    """Sorts the flags. Raises InvalidRequest, also for what either service would refuse."""
    parser = argparse.ArgumentParser(
        prog="python -m mint_core.hosting.serve", description=HELP, allow_abbrev=False
    )
    help = "file to write, as JSON, the addresses to once both services are ready"
    parser.add_argument("--ready-file", type=Path, help=help)
    own, words = parser.parse_known_args(argv)
    given: dict[Role, list[str]] = {role: [] for role in get_args(Role)}
    roles = list(given)
    for word in words:
        if word.startswith("--"):
            roles = [role for role in given if word.startswith(f"--{role}-")] or list(given)
        for role in roles:
            given[role].append(word)
    return ServeFlags(
        trainer=_plain("trainer", given["trainer"]),
        sampler=_plain("sampler", given["sampler"]),
        sampler_address=_address_to_tell(*(_settings(role, given[role]) for role in given)),
        ready_file=own.ready_file,
    )


def _plain(role: Role, words: Sequence[str]) -> tuple[str, ...]:
    return tuple(re.sub(f"^--{role}-", "--", word) for word in words)


def _settings(role: Role, words: Sequence[str]) -> Any:
    """Returns its configuration. Raises InvalidRequest, with flags as they were given."""
    given = {_plain(role, [flag])[0]: flag for flag in (word.partition("=")[0] for word in words)}
    kind = resolve_name(f"{role}_service.config:{role.title()}Config")
    try:
        config = Settings(role, kind, _plain(role, words)).config
    except InvalidRequest as error:
        message = re.sub(r"--[\w-]+", lambda flag: given.get(flag[0], flag[0]), error.message)
        raise InvalidRequest(f"{role}: {message}") from error
    if config.ready_file:
        raise InvalidRequest(f"`ready_file` of the {role} is not for this; use --ready-file")
    return config


def _address_to_tell(trainer: Any, sampler: Any) -> str:
    """Returns the sampler's address if clients would not find it without being told."""
    for name in ("address", "metrics_address"):
        address = getattr(trainer, name)
        if address == getattr(sampler, name) and not address.endswith(":0") and address:
            ways = " and ".join(f"--{role}-{name.replace('_', '-')}" for role in get_args(Role))
            raise InvalidRequest(f"`{name}` {address} is the same for both services; use {ways}")
    host, port = host_and_port(sampler.address, "address")
    if port == SAMPLER_PORT or trainer.sampler_address:
        return ""
    if host in ("0.0.0.0", "::"):
        raise InvalidRequest(
            f"`address` {sampler.address} of the sampler does not say where clients reach it;"
            " add --trainer-sampler-address HOST:PORT"
        )
    return str(sampler.address)
