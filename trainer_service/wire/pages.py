"""Pages of lists, newest first. A token says behind which entry the next page begins, and for which
filters it was given.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from mint_core.errors import InvalidRequest
from trainer_service.wire.fields import within

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

T = TypeVar("T")
Place = tuple[int, str]  # when an entry was created, in microseconds since 1970, and its name
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    size: int
    skip: int
    after: Place | None  # of the last entry of the page before; None: from the newest
    filters: Any  # JSON


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    entries: Sequence[T]
    next_page_token: str  # empty: this is the last
    total_size: int


def parse_page(request: Any, filters: object) -> PageRequest:
    """Reads `page_size`, `page_token` and `skip` of a request with those filters."""
    return PageRequest(
        size=within(request.page_size, "page_size", 0, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE,
        skip=within(request.skip, "skip", 0),
        after=_parse_token(request.page_token, filters),
        filters=filters,
    )


def place(create_time: datetime, name: str) -> Place:
    return (create_time - _EPOCH) // timedelta(microseconds=1), name


def page_of(entries: Sequence[T], place_of: Callable[[T], Place], request: PageRequest) -> Page[T]:
    """Cuts a page out of all entries that the filters leave."""
    after = request.after
    following = sorted(
        (entry for entry in entries if after is None or place_of(entry) < after),
        key=place_of,
        reverse=True,
    )[request.skip :]
    chosen = following[: request.size]
    more = len(following) > len(chosen)
    token = _token(place_of(chosen[-1]), request.filters) if more else ""
    return Page(chosen, token, len(entries))


def _token(last: Place, filters: object) -> str:
    content = json.dumps([*last, filters], sort_keys=True)
    return base64.urlsafe_b64encode(content.encode()).decode()


def _parse_token(token: str, filters: object) -> Place | None:
    if not token:
        return None
    try:
        microseconds, name, made_for = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        microseconds, name, made_for = None, None, None
    if type(microseconds) is not int or type(name) is not str or made_for != filters:
        raise InvalidRequest(
            "`page_token` was not given for this filter; pass `next_page_token` as it was "
            "answered, with the same filters",
            field="page_token",
        )
    return microseconds, name
