"""A sampler's engine without a model: it holds row files, and says which.

`python -m tests.engines.sampler FD`. Its configuration is the largest sum of ranks.
"""

import os
from dataclasses import replace
from pathlib import Path

from checkpoint_store import open_row
from mint_core.engine_host.pipe import Hello, Reply, connect
from mint_core.errors import InvalidRequest
from sampler_service.jobs import (
    BASE_MODEL,
    AdapterAbsent,
    DescribeRows,
    DropAdapter,
    Generate,
    Generated,
    LoadAdapter,
    RowUnusable,
)
from tests.engines.echo_jobs import MODEL
from tests.engines.sampler_jobs import Die, Use
from tests.unit.checkpoint_store.rows import LAYOUT


def main() -> None:
    pipe, adapter_ranks = connect()
    model = replace(MODEL, fingerprint="f00d")
    pipe.send(Hello(model, adapter_ranks=adapter_ranks))
    held: list[str] = []
    while (call := pipe.receive()) is not None:
        try:
            pipe.send(Reply(call.number, answer(call.job, held)))
        except Exception as error:
            pipe.fail(call.number, error)


def answer(job: object, held: list[str]) -> object:
    match job:
        case LoadAdapter(path, file):
            load(path, Path(file))
            held.append(path)
        case DropAdapter(path):
            held.remove(path)
        case DescribeRows():
            return LAYOUT
        case Use(path):
            if path not in held:
                raise AdapterAbsent("it is not here")
            return tuple(held)
        case Generate(adapter=path):
            if path != BASE_MODEL and path not in held:
                raise AdapterAbsent("it is not here")
            return Generated(continuations=())
        case Die():
            os._exit(3)
        case _:
            raise AssertionError(f"unknown job {job!r}")
    return None


def load(path: str, file: Path) -> None:
    if not file.exists() or open_row(file, path).layout != LAYOUT:
        raise RowUnusable("no such row")
    if "/bad@" in path:  # unnamed ones have hexadecimal names
        raise InvalidRequest("this one is bad")


if __name__ == "__main__":
    main()
