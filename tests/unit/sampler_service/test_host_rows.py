"""Rows in host memory beside a GPU: bounded, and those used lately stay."""

import torch

from sampler_service.engine.loaded_adapters import HostRows


def row(value: float) -> torch.Tensor:
    return torch.full((4,), value)  # 16 bytes


def test_those_used_lately_stay() -> None:
    rows = HostRows(48)
    for i, name in enumerate("abc"):
        rows.put(name, row(float(i)))
    first = rows.get("a")
    assert first is not None
    assert first[0] == 0
    rows.put("d", row(3.0))
    assert [rows.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert rows.size_bytes == 48


def test_a_row_that_exceeds_the_limit_alone_moves_nobody() -> None:
    rows = HostRows(32)
    rows.put("a", row(0.0))
    rows.put("b", torch.zeros(9))
    assert rows.get("a") is not None
    assert rows.get("b") is None
