"""What users did and were told, in files: a line of JSON an event, whole however a process dies."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Writer:
    """Appends events of one user, on a timeline: 0, or one that will be abandoned. A line is one
    write, so that a kill leaves all or nothing.
    """

    def __init__(self, file: Path, user: int, timeline: int = 0) -> None:
        self._always = {"user": user, "timeline": timeline}
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, event: str, **fields: Any) -> None:
        content = {**self._always, "event": event, **fields}
        os.write(self._descriptor, json.dumps(content).encode() + b"\n")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, in order."""
    with file.open() as lines:
        yield from map(json.loads, lines)


def places(file: Path, timeline: int) -> tuple[dict[int, int], set[int]]:
    """The place of each call's number on a timeline, and the places that were answered."""
    called, answered = {}, set()
    for event in read(file):
        if event["timeline"] not in (0, timeline):
            continue
        if event["event"] == "called":
            called[event["sequence"]] = event["place"]
        elif event["event"] == "answered":
            answered.add(event["place"])
    return called, answered


def has_parted(file: Path, timeline: int) -> bool:
    """Whether a timeline has data of its own, a step on them, and a save of what that made, in the
    run that there was before it.
    """
    kinds: dict[int, str] = {}
    runs: dict[int, str] = {}
    added = stepped = False
    for event in read(file) if file.exists() else ():
        if event["event"] == "opened":
            runs[event["timeline"]] = event["run"]
        elif event["timeline"] == timeline and event["event"] == "called":
            kinds[event["place"]] = event["kind"]
        elif event["timeline"] == timeline and event["event"] == "answered":
            kind = kinds[event["place"]]
            added = added or kind in ("add", "many", "crumb")
            stepped = stepped or (added and kind == "step")
            if stepped and kind in ("save", "publish"):
                return runs.get(timeline) == runs.get(0)
    return False


def answered(file: Path) -> int:
    """How many answers a file tells of so far."""
    try:
        return file.read_bytes().count(b'"event": "answered"')
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one user is: the last place called, the last answered, and how much it was told."""

    called: int = 0
    answered: int = 0
    answers: int = 0  # samples among them

    def has_left(self, then: "Progress") -> bool:
        """Whether every call that was under way then has been answered since."""
        return self.answered >= then.called and self.answers > then.answers


def progress(file: Path) -> Progress:
    events = list(read(file)) if file.exists() else []
    places = {"called": 0, "answered": 0}
    for event in events:
        if event["event"] in places:
            places[event["event"]] = event["place"]
    answers = sum(event["event"] in ("answered", "sampled") for event in events)
    return Progress(**places, answers=answers)
