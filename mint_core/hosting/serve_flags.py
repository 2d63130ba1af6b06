"""The command line of `python -m mint_core.hosting.serve`: which flag goes to which service."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mint_core.addresses import host_and_port
from mint_core.errors import InvalidRequest

EMBEDDED_MODEL = Path(".models/SmolLM2-135M-Instruct")
SAMPLER_PORT = 50052  # where clients look for the sampler unless the trainer says otherwise

HELP = f"""\
usage: python -m mint_core.hosting.serve [--FLAG VALUE ...]

Starts trainer and sampler, says where they listen, and stops both on Ctrl-C.

  --trainer-FLAG VALUE  goes to the trainer as --FLAG, such as --trainer-address 127.0.0.1:50061
  --sampler-FLAG VALUE  goes to the sampler as --FLAG
  --FLAG VALUE          goes to both, such as --store FOLDER or --device cuda
  --base-model MODEL    folder or hub id; default {EMBEDDED_MODEL}, which `make model` makes
  --ready-file FILE     file to write, as JSON, the addresses to once both services are ready

`python -m trainer_service --help` and `python -m sampler_service --help` list the flags.
"""
_OF_ONE = ("--address", "--metrics-address")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    trainer: tuple[str, ...]
    sampler: tuple[str, ...]
    sampler_address: str  # that the trainer must tell; empty: none, clients find it by themselves
    ready_file: Path | None


def parse_serve_flags(argv: Sequence[str]) -> ServeFlags:
    """Sorts the flags; what they mean is for the services. Raises InvalidRequest, ValueError."""
    trainer: list[str] = []
    sampler: list[str] = []
    ready_file = None
    for name, words in _flags(argv):
        if name in _OF_ONE:
            raise InvalidRequest(
                f"`{name}` would be the same for both services; use --trainer-{name[2:]} and"
                f" --sampler-{name[2:]}"
            )
        if name == "--ready-file":
            ready_file = Path(_value(name, words))
        elif name.startswith("--trainer-"):
            trainer += ["--" + words[0].removeprefix("--trainer-"), *words[1:]]
        elif name.startswith("--sampler-"):
            sampler += ["--" + words[0].removeprefix("--sampler-"), *words[1:]]
        else:
            trainer += words
            sampler += words
    for flags in (trainer, sampler):
        if _find(flags, "--base-model") is None:
            flags += ["--base-model", str(EMBEDDED_MODEL)]
    return ServeFlags(
        trainer=tuple(trainer),
        sampler=tuple(sampler),
        sampler_address=_address_to_tell(trainer, sampler),
        ready_file=ready_file,
    )


def _flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag's name with its words: itself and what follows it up to the next flag."""
    flags: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            flags.append([word])
        elif not flags:
            raise InvalidRequest(f"{word!r} is no flag; see --help")
        else:
            flags[-1].append(word)
    return [(words[0].partition("=")[0], words) for words in flags]


def _value(name: str, words: list[str]) -> str:
    _, equals, value = words[0].partition("=")
    values = ([value] if equals else []) + words[1:]
    if len(values) != 1 or not values[0]:
        raise InvalidRequest(f"`{name}` takes one value, got {len(values)}")
    return values[0]


def _find(flags: Sequence[str], wanted: str) -> str | None:
    values = [_value(name, words) for name, words in _flags(flags) if name == wanted]
    return values[-1] if values else None


def _address_to_tell(trainer: Sequence[str], sampler: Sequence[str]) -> str:
    """Returns the sampler's address if clients would not find it without being told."""
    address = _find(sampler, "--address")
    if address is None or _find(trainer, "--sampler-address") is not None:
        return ""
    host, port = host_and_port(address, "sampler_address")
    if port == SAMPLER_PORT:
        return ""
    if host in ("0.0.0.0", "::"):
        raise InvalidRequest(
            f"`--sampler-address` {address} does not say where clients reach the sampler;"
            " add --trainer-sampler-address HOST:PORT"
        )
    return address
