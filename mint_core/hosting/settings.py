"""A service's configuration from its flags, the environment and a file."""

import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Generic, TypeVar, get_args

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, Token, UnknownOptionError
from cyclopts.config import Dict, Env

from mint_core.errors import InvalidRequest
from mint_core.hosting.service_config import ServiceConfig
from mint_core.rpc.hosting import Role

C = TypeVar("C", bound=ServiceConfig)

OF_CLIENTS = "MINT_SAMPLER_URL"  # named as an option of the sampler, but it is none
HELP = """{summary}

Every option can be a flag, such as --threads 2, a variable of the environment, {prefix}THREADS=2, \
and a key of the TOML file that --config names, threads = 2, at its beginning or under [{role}]. A \
flag wins over a variable, and a variable over the file."""


class Settings(Generic[C]):
    """The configuration of one service, and where each of its options was given. Raises
    InvalidRequest for what is unknown or wrong; `--help` ends the process.
    """

    config: C

    def __init__(self, role: Role, kind: type[C], words: Sequence[str]) -> None:
        self._role = role
        self._prefix = f"MINT_{role.upper()}_"
        self._flags = {entry.name: "--" + entry.name.replace("_", "-") for entry in fields(kind)}
        app = App(
            name=f"python -m {role}_service",
            help=HELP.format(summary=kind.__doc__, prefix=self._prefix, role=role),
            help_format="plaintext",
            group_commands="Parameters",
            version_flags=(),
            # Without --no-FLAG: it would also be a key of the file, and set the contrary.
            default_parameter=Parameter(negative=()),
            config=self._complete,
            result_action="return_value",
        )
        default = kind()

        @app.default
        def made(config: Annotated[kind, Parameter(name="*")] = default) -> C:  # type: ignore[valid-type]
            return config

        try:
            self.config = app(words, print_error=False, exit_on_error=False) or sys.exit()
        except CycloptsError as error:
            raise InvalidRequest(re.sub(r'"?\[(\w+)\]"?', r"\1", f"{error} See --help.")) from error
        except ValueError as error:
            raise InvalidRequest(self.as_given(str(error))) from error

    def as_given(self, message: str) -> str:
        """The message, each option in it named as it was given, or as a flag if it was not."""
        return re.sub(r"`(\w+)`", lambda name: self._as_given(name[1]), message)

    def _as_given(self, name: str) -> str:
        flag = self._flags.get(name, name)
        for token in self._given[flag].tokens if name in self._flags else ():
            file = "" if token.source in ("cli", "env") else f" in {token.source}"
            return f"`{str(token.keyword).strip('[]')}`{file}"
        return f"`{flag}`"

    def _complete(self, app: App, commands: tuple[str, ...], given: ArgumentCollection) -> None:
        """Adds to the flags what the environment, and then the file, says of other options."""
        self._given = given
        known = {OF_CLIENTS, *(self._prefix + name.upper() for name in self._flags)}
        for variable in os.environ:
            if variable.startswith(self._prefix) and variable not in known:
                token = Token(keyword=variable, source="env")
                raise UnknownOptionError(token=token, argument_collection=given)
        Env(self._prefix, command=False)(app, commands, given)
        for file in given["--config"].tokens:
            Dict(self._keys(file), source=file.value)(app, commands, given)
        for name, flag in self._flags.items():
            for token in given[flag].tokens:
                if given[flag].hint is int and "." in token.value:  # else cut off
                    raise ValueError(f"`{name}` is no whole number: {token.value}")
                if given[flag].hint == Path | None and not token.value:  # else this folder
                    raise ValueError(f"`{name}` is empty; leave it out")

    def _keys(self, file: Token) -> dict[str, object]:
        """What a file says to this service."""
        try:
            keys = tomllib.loads(Path(file.value).read_text(encoding="utf-8"))
            tables = {it: keys.pop(it) for it in get_args(Role) if type(keys.get(it)) is dict}
            keys.update(tables.get(self._role, {}))
            if "config" in keys:
                raise ValueError("it names another file")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"`config` {file.value} cannot be read: {why}") from error
        return keys
