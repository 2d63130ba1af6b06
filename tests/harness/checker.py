"""Is a history of calls and answers one that a server may have which loses nothing and repeats
nothing? Knows nothing of the server and shares no code with it: standard library only.

A history is a list of events, dicts of JSON, of several users, each with one run whose script is a
fixed list of places, 1, 2, 3, ... A user's process may die; the next one, another `life`, opens the
run again and goes on where the server says.

- `opened`: life, run, next (place), step: what the server said of the run
- `called`: life, place, kind: `step`, `load` (of what the first `save` saved), or anything else
- `answered`: life, place, answer (text in which every bit shows), and of a step its number
- `sampled`: key, answer: what a sampler drew, of which the same key always means the same
- `failed`: what a user was told instead of an answer
- `final`: run, next, step, weights (digest): how the run was found in the end
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class _User:
    run: str = ""
    kinds: dict[int, str] = field(default_factory=dict)  # by place
    answers: dict[int, str] = field(default_factory=dict)  # by place
    steps: dict[int, int] = field(default_factory=dict)  # told, by place
    samples: dict[str, str] = field(default_factory=dict)  # by key
    unanswered: set[int] = field(default_factory=set)  # of the present life
    life: int = -1
    weights: str = ""

    @property
    def first_unsent(self) -> int:
        return max(self.kinds, default=0) + 1

    @property
    def first_unanswered(self) -> int:
        """Behind the last place that was answered."""
        return max(self.answers, default=0) + 1

    def steps_behind(self, place: int) -> int:
        """The run's step once a place has been executed, by the script alone."""
        step = saved = 0
        for each in range(1, place + 1):
            match self.kinds.get(each):
                case "step":
                    step += 1
                case "save" if not saved:
                    saved = step
                case "load":
                    step = saved
        return step


def problems(history: Sequence[Event], undisturbed: Sequence[Event]) -> list[str]:
    """All that is wrong with a history, beside that of the same scripts on a server on which
    nothing died; nothing if it is right.
    """
    expected: dict[str, _User] = {}
    found = list(_read(undisturbed, expected))
    users: dict[str, _User] = {}
    found += _read(history, users)
    for name, other in expected.items():
        found += _compare(name, users.get(name, _User()), other)
    found += [f"user {name}: has no script" for name in users if name not in expected]
    return found


def _read(history: Sequence[Event], users: dict[str, _User]) -> Iterator[str]:
    """Goes through a history in its order; what is wrong by itself shows here."""
    for event in history:
        name = str(event["user"])
        user = users.setdefault(name, _User())
        for problem in _take(user, event):
            yield f"user {name}: {problem}"


def _take(user: _User, event: Event) -> Iterator[str]:
    match event["event"]:
        case "opened":
            yield from _opened(user, event)
        case "called":
            user.kinds[event["place"]] = event["kind"]
            user.unanswered.add(event["place"])
        case "answered":
            yield from _answered(user, event)
        case "sampled":
            before = user.samples.setdefault(event["key"], event["answer"])
            if before != event["answer"]:
                yield f"sample {event['key']} was drawn twice, and differs"
        case "failed":
            yield f"was told {event['error']}"
        case "final":
            yield from _final(user, event)
        case unknown:
            yield f"event {unknown} has no meaning"


def _opened(user: _User, event: Event) -> Iterator[str]:
    if user.run and event["run"] != user.run:
        yield f"has run {event['run']} beside {user.run}"
    user.run = event["run"]
    if event["life"] != user.life:
        user.life = event["life"]
        user.unanswered.clear()  # who asked is gone; what became of it, `next` says
    if event["next"] < user.first_unanswered:
        yield f"call {user.first_unanswered - 1} was answered, and is lost: next is {event['next']}"
    if event["next"] > user.first_unsent:
        yield f"call {user.first_unsent} was never made, and next is {event['next']}"
    if event["step"] != user.steps_behind(event["next"] - 1):
        yield (
            f"is at step {event['step']} behind call {event['next'] - 1}, not at "
            f"{user.steps_behind(event['next'] - 1)}"
        )


def _answered(user: _User, event: Event) -> Iterator[str]:
    place = event["place"]
    if place not in user.kinds:
        yield f"call {place} was answered and never made"
    user.unanswered.discard(place)
    before = user.answers.setdefault(place, event["answer"])
    if before != event["answer"]:
        yield f"call {place} was answered twice, and differs: {event['answer']} is not {before}"
    if "step" in event and event["step"] != user.steps_behind(place):
        yield f"call {place} took step {event['step']}, not {user.steps_behind(place)}"


def _final(user: _User, event: Event) -> Iterator[str]:
    for place in sorted(user.unanswered):
        yield f"call {place} was never answered"
    if event["run"] != user.run:
        yield f"has run {event['run']} beside {user.run}"
    if event["next"] != user.first_unsent:
        yield f"made {user.first_unsent - 1} calls, and the run has {event['next'] - 1}"
    if event["step"] != user.steps_behind(user.first_unsent - 1):
        yield (f"ends at step {event['step']}, not at {user.steps_behind(user.first_unsent - 1)}")
    user.weights = event["weights"]


def _compare(name: str, user: _User, other: _User) -> Iterator[str]:
    if user.kinds != other.kinds:
        yield f"user {name}: made {len(user.kinds)} calls of {len(other.kinds)}, or others"
    for place, answer in sorted(user.answers.items()):
        if answer != other.answers.get(place, answer):
            yield f"user {name}: call {place} has answer {answer}, not {other.answers[place]}"
    for key, answer in user.samples.items():
        if answer != other.samples.get(key, answer):
            yield f"user {name}: sample {key} differs"
    if not user.weights or user.weights != other.weights:
        found = user.weights or "not there"
        yield f"user {name}: the final weights are {found}, not {other.weights}"
