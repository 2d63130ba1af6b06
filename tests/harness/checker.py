"""Is a history of calls and answers one that a server may have which loses nothing and repeats
nothing? Knows nothing of the server and shares no code with it: standard library only.

A history is a list of events, dicts of JSON, of several users, each with one run whose script is a
fixed list of places, 1, 2, 3, ... A call's sequence is its number in the run: the same as its place
until a save found no room and was made again. A user's process may die; the next one, another
`life`, opens the run again and goes on where the server says.

On a timeline other than 0 users have left the others' ways, from where they were, and the server
has forgotten all of it since: a backup was put in its place.

- `opened`: life, run, next (sequence), step: what the server said of the run
- `called`: life, place, sequence, kind: `step`, `load` (of what the first `save` saved), or others
- `answered`: life, place, sequence, answer (text in which every bit shows), of a step its number
- `refused`: place, sequence, reason: a save that found no room
- `sampled`: key, answer: what a sampler drew, of which the same key always means the same
- `failed`: what a user was told instead of an answer
- `abandoned`: run, saved (digests by name, or empty): what a timeline that is abandoned leaves
- `final`: run, next, step, weights (digest), saved: how the run was found in the end
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]
SAVES = ("save", "publish")


@dataclass
class _User:
    run: str = ""
    kinds: dict[int, str] = field(default_factory=dict)  # by place
    places: dict[int, int] = field(default_factory=dict)  # by sequence
    answers: dict[int, str] = field(default_factory=dict)  # by place
    steps: dict[int, int] = field(default_factory=dict)  # told, by place
    samples: dict[str, str] = field(default_factory=dict)  # by key
    unanswered: set[int] = field(default_factory=set)  # places, of the present life
    unsaved: set[int] = field(default_factory=set)  # places of saves that were refused
    first_unanswered: int = 1  # sequence, behind the last that was answered
    life: int = -1
    weights: str = ""
    saved: Mapping[str, str] = field(default_factory=dict)
    abandoned: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def first_unsent(self) -> int:
        """A sequence."""
        return max(self.places, default=0) + 1

    def steps_before(self, sequence: int) -> int:
        """The run's step once all calls before that have been executed, by the script alone."""
        done = [place for number, place in self.places.items() if number < sequence]
        return self.steps_behind(max(done, default=0))

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


def crossings(history: Sequence[Event]) -> int:
    """How many names held other weights, on timelines that were abandoned, than they do now."""
    final = {event["run"]: event["saved"] for event in history if event["event"] == "final"}
    left = [event for event in history if event["event"] == "abandoned" and event["run"] in final]
    return sum(
        saved not in ("", final[event["run"]][path])
        for event in left
        for path, saved in event["saved"].items()
    )


def problems(
    history: Sequence[Event], undisturbed: Sequence[Event], *, refusals: bool = False
) -> list[str]:
    """All that is wrong with a history, beside that of the same scripts on a server on which
    nothing died; nothing if it is right. With `refusals` there was no room for saves at times.
    """
    expected: dict[str, _User] = {}
    found = list(_read(undisturbed, expected))
    users: dict[str, _User] = {}
    found += _read(history, users)
    if not refusals:
        refused = sum(event["event"] == "refused" for event in history)
        found += [f"{refused} saves found no room, and there was room"] if refused else []
    for name, other in expected.items():
        found += _compare(name, users.get(name, _User()), other)
    found += [f"user {name}: has no script" for name in users if name not in expected]
    return found


def _read(history: Sequence[Event], users: dict[str, _User]) -> Iterator[str]:
    """Goes through a history in its order; what is wrong by itself shows here."""
    others: dict[tuple[str, int], _User] = {}
    for event in history:
        name, timeline = str(event["user"]), event.get("timeline", 0)
        user = users.setdefault(name, _User())
        where = ""
        if timeline and event["event"] != "abandoned":
            where = f" on timeline {timeline}"
            user = others.setdefault((name, timeline), deepcopy(user))
        for problem in _take(user, event):
            yield f"user {name}{where}: {problem}"


def _take(user: _User, event: Event) -> Iterator[str]:
    match event["event"]:
        case "opened":
            yield from _opened(user, event)
        case "called":
            user.kinds[event["place"]] = event["kind"]
            user.places[event["sequence"]] = event["place"]
            user.unanswered.add(event["place"])
        case "answered":
            yield from _answered(user, event)
        case "refused":
            yield from _refused(user, event)
        case "sampled":
            before = user.samples.setdefault(event["key"], event["answer"])
            if before != event["answer"]:
                yield f"sample {event['key']} was drawn twice, and differs"
        case "failed":
            yield f"was told {event['error']}"
        case "abandoned":
            user.abandoned.append(event["saved"])
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
    for sequence in [each for each in user.places if each >= event["next"]]:
        del user.places[sequence]  # its number is another call's
    if event["step"] != user.steps_before(event["next"]):
        yield (
            f"is at step {event['step']} behind call {event['next'] - 1}, not at "
            f"{user.steps_before(event['next'])}"
        )


def _refused(user: _User, event: Event) -> Iterator[str]:
    place = event["place"]
    if user.kinds.get(place) not in SAVES:
        yield f"call {place} saves nothing, and was refused: {event['reason']}"
    user.unanswered.discard(place)
    user.unsaved.add(place)
    user.first_unanswered = max(user.first_unanswered, event["sequence"] + 1)


def _answered(user: _User, event: Event) -> Iterator[str]:
    place = event["place"]
    if place not in user.kinds:
        yield f"call {place} was answered and never made"
    user.unanswered.discard(place)
    user.unsaved.discard(place)
    user.first_unanswered = max(user.first_unanswered, event["sequence"] + 1)
    before = user.answers.setdefault(place, event["answer"])
    if before != event["answer"]:
        yield f"call {place} was answered twice, and differs: {event['answer']} is not {before}"
    if "step" in event and event["step"] != user.steps_behind(place):
        yield f"call {place} took step {event['step']}, not {user.steps_behind(place)}"


def _final(user: _User, event: Event) -> Iterator[str]:
    for place in sorted(user.unanswered):
        yield f"call {place} was never answered"
    for place in sorted(user.unsaved):
        yield f"call {place} found no room, and was not made again"
    if event["run"] != user.run:
        yield f"has run {event['run']} beside {user.run}"
    if event["next"] != user.first_unsent:
        yield f"made {user.first_unsent - 1} calls, and the run has {event['next'] - 1}"
    if event["step"] != user.steps_before(user.first_unsent):
        yield f"ends at step {event['step']}, not at {user.steps_before(user.first_unsent)}"
    user.weights = event["weights"]
    user.saved = event["saved"]


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
    yield from _compare_saved(name, user, other)


def _compare_saved(name: str, user: _User, other: _User) -> Iterator[str]:
    """Under each name lies what this timeline has saved under it."""
    for path, wanted in other.saved.items():
        found = user.saved.get(path, "")
        if found == wanted:
            continue
        found = found or "not there"
        if any(found == saved.get(path) for saved in user.abandoned):
            found = "those of a timeline that was abandoned"
        yield f"user {name}: the weights under {path} are {found}, not {wanted}"
