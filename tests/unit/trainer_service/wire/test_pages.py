"""Pages of lists."""

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_core.errors import InvalidRequest
from mintrpc.v1 import trainer_pb2
from trainer_service.wire.pages import Page, Place, page_of, parse_page, place

Request = trainer_pb2.ListTrainingRunsRequest
START = datetime(2026, 1, 1, tzinfo=UTC)
FILTERS = {"a": "b"}


def entries(count: int) -> list[Place]:
    """In no order; two and two at the same time."""
    places = [place(START + timedelta(seconds=n // 2), f"r-{n}") for n in range(count)]
    return places[1::2] + places[::2]


def page(found: list[Place], filters: object = FILTERS, **fields: object) -> Page[Place]:
    request = Request(**fields)  # type: ignore[arg-type]
    return page_of(found, lambda entry: entry, parse_page(request, filters))


@given(count=st.integers(0, 12), size=st.integers(1, 5))
def test_pages_have_every_entry_once_newest_first(count: int, size: int) -> None:
    found, seen, token = entries(count), [], ""
    while True:
        answer = page(found, page_size=size, page_token=token)
        seen += answer.entries
        assert answer.total_size == count
        assert len(answer.entries) <= size
        token = answer.next_page_token
        if not token:
            break

    assert seen == sorted(found, reverse=True)


def test_entries_made_meanwhile_do_not_shift_pages() -> None:
    found = entries(4)
    first = page(found, page_size=2)

    second = page(
        [*found, place(START + timedelta(hours=1), "new")], page_token=first.next_page_token
    )

    assert [*first.entries, *second.entries] == sorted(found, reverse=True)


def test_skipping_leaves_entries_out_before_the_page() -> None:
    found = entries(6)

    answer = page(found, page_size=2, skip=3)

    assert answer.entries == sorted(found, reverse=True)[3:5]
    assert page(found, skip=9).entries == []


def test_a_token_belongs_to_its_filters() -> None:
    token = page(entries(4), page_size=2).next_page_token
    with pytest.raises(InvalidRequest, match="not given for this filter"):
        page(entries(4), filters={}, page_token=token)


@given(st.text(max_size=40))
def test_no_token_crashes(token: str) -> None:
    with contextlib.suppress(InvalidRequest):
        page(entries(2), page_token=token)


@pytest.mark.parametrize("field", ["page_size", "skip"])
def test_negative_numbers(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}` is -1"):
        page([], **{field: -1})
