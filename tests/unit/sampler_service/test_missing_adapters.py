"""Whom nobody holds up who asks for adapters that are not there. The engine has no model."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from checkpoint_store import CheckpointStore
from mint_core.errors import CheckpointNotFound
from tests.unit.sampler_service.test_adapter_leases import LIMIT_S, serving


async def test_who_looks_for_much_that_is_not_there_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, find = threading.Event(), CheckpointStore.find

    def slow(store: CheckpointStore, path: str, *, tenant: str, **wanted: Any) -> Any:
        if tenant == "other":
            gate.wait(LIMIT_S)
        return find(store, path, tenant=tenant, **wanted)

    monkeypatch.setattr(CheckpointStore, "find", slow)
    monkeypatch.setattr(CheckpointStore, "appear_limit_s", 0.0)
    async with serving(tmp_path) as front:
        nowhere = [f"mint://r-1/sampler_weights/none-{i}" for i in range(50)]
        flood = [front.start(path, "other") for path in nowhere]
        await asyncio.sleep(0)

        path = front.publish()
        assert await front.use(path) == (path,)

        assert not any(task.done() for task in flood)
        gate.set()
        for task in flood:
            with pytest.raises(CheckpointNotFound):
                await task
