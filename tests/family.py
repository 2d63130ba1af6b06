"""A row of the table of families, and what rows are made of."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from _pytest.mark import ParameterSet
from packaging.version import Version

from tests.models import SIZES, make_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table."""

    name: str
    architecture: str  # the class that config.json names
    # What sets it apart; of a refused one what is missing, as the refusal has it.
    own: str
    served: bool
    values: Mapping[str, Any] = field(repr=False)  # of a tiny configuration
    # PEFT takes the names of its MLPs for those that experts had before transformers fused them.
    peft_opens_mlps: bool = True
    gated_attention: bool = False  # of which the same goes for the gate
    models_only: bool = False  # tested by `make models` alone, whatever its code path is called
    since: str = ""  # the release of transformers from which on the row is true; earlier: refused
    tolerance: float = 1e-5  # of the norm of each tensor, against float64

    @property
    def id(self) -> str:
        return self.name.lower().replace(" ", "-")

    @property
    def stars(self) -> str:
        """Of what opens in no PEFT."""
        return " **" if self.gated_attention else "" if self.peft_opens_mlps else " *"

    @property
    def paths(self) -> set[str | int]:
        """Of code, one by one, and how many there are; of refusals without the names that are in
        them.
        """
        if not self.served:
            return {re.sub(r"`.*?`|'.*?'|\(.*?\)|\d+", "", self.own)}
        own = self.own.split("; ")
        return {*own, len(own)}

    @property
    def has_class(self) -> bool:
        """In this release of transformers."""
        return hasattr(transformers, self.architecture)

    @property
    def unknown(self) -> str:
        """Why the row is not true of this release of transformers; empty if it is."""
        release = transformers.__version__
        if not self.has_class:
            return f"transformers {release} has no {self.architecture}"
        if self.since and Version(release) < Version(self.since):
            return f"true of {self.architecture} from transformers {self.since} on"
        return ""

    @property
    def reads_more_than_text(self) -> bool:
        return "text_config" in self.values

    def make(self, folder: Path, **changes: Any) -> Path:
        """A tiny seeded model, none of whose weights is 0 or 1. Skips the test of one that is not
        known.
        """
        if not self.has_class:
            pytest.skip(self.unknown)
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**{**self.values, **changes})
        return make_model(folder, model_class, config)


def params(
    families: Sequence[Family], by_default: Collection[str] | None = None
) -> list[ParameterSet]:
    """What tests are run with: by default those of these names, or else the first of each code
    path, and of those that have several the first of so many; all by `make models`.
    """
    chosen = []
    paths: set[str | int] = set()
    for family in families:
        marks = [pytest.mark.xdist_group(family.id)]
        own = family.paths
        first = not (family.unknown or own <= paths or family.models_only)
        if family.unknown:
            marks.append(pytest.mark.skip(reason=family.unknown))
        else:
            paths |= own
        if not (first if by_default is None else family.name in by_default):
            marks.append(pytest.mark.models)
        chosen.append(pytest.param(family, id=family.id, marks=marks))
    return chosen


def sized(**changes: Any) -> dict[str, Any]:
    """None: no such value."""
    return {key: value for key, value in {**SIZES, **changes}.items() if value is not None}


def served(
    name: str,
    architecture: str,
    own: str,
    *,
    peft_opens_mlps: bool = True,
    gated_attention: bool = False,
    tolerance: float = 1e-5,
    since: str = "",
    **changes: Any,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        own=own,
        served=True,
        values=sized(**changes),
        peft_opens_mlps=peft_opens_mlps,
        gated_attention=gated_attention,
        tolerance=tolerance,
        since=since,
    )


def composite(
    name: str,
    architecture: str,
    own: str,
    *,
    peft_opens_mlps: bool = True,
    models_only: bool = False,
    tolerance: float = 1e-5,
    since: str = "",
    **values: Any,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        own=f"text alone; {own}",
        served=True,
        values=values,
        peft_opens_mlps=peft_opens_mlps,
        models_only=models_only,
        tolerance=tolerance,
        since=since,
    )


def refused(name: str, architecture: str, own: str, *, since: str = "", **changes: Any) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        own=own,
        served=False,
        values=sized(**changes),
        since=since,
    )
