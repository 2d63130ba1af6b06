"""Merged models of several tenants: who comes next, and who gets none. Nothing is merged."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore
from checkpoint_store.errors import StoreQuotaExceeded
from mint_core.errors import NotFound
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from tests.checkpoint_files import publish_as
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.rows import snapshot
from tests.unit.trainer_service.models import MODEL
from trainer_service.checkpoints import exports
from trainer_service.checkpoints.apart import Merge
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.exports import Exports
from trainer_service.checkpoints.requests import ExportCheckpoint
from trainer_service.wire.idempotency import remembered_ids
from trainer_service.wire.requests import Identity

LIMIT_S = 30.0


class Merging:
    """Exports of a store, and whose were merged."""

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        quota_bytes: int = 0,
        linger_s: float = 0.0,
    ) -> None:
        self.store = CheckpointStore(root, quota_bytes=quota_bytes)

        async def no_engine(job: object) -> None:
            raise AssertionError

        async def merge(module: str, job: Merge) -> bool:
            self.merged.append(self._tenants[Path(job.adapter_folder).parents[2].name])
            Path(job.output_folder, "model.safetensors").write_bytes(b"merged")
            await self.gate.wait()
            return False

        monkeypatch.setattr(exports, "do_apart", merge)
        quotas = QuotaBook(None, Metrics())
        self.exports = Exports(
            Checkpoints(self.store, None, no_engine),
            quotas,
            remembered_ids(quotas),
            threads=1,
            linger_s=linger_s,
        )
        self._tenants: dict[str, str] = {}
        self.merged: list[str] = []
        self.gate = asyncio.Event()

    def export(self, tenant: str, number: int) -> "asyncio.Task[object]":
        run = f"run-{tenant}-{number}"
        self._tenants[run] = tenant
        manifest = replace(snapshot(name="a", tenant=tenant), training_run_id=run)
        manifest = replace(manifest, base_fingerprint=MODEL.fingerprint)
        published = publish_as(self.store, manifest, adapter()["weights"])
        request = ExportCheckpoint(
            path=str(published.path),
            identity=Identity(run, b""),
            dtype="",
            expire_time=datetime.now(UTC) + timedelta(days=1),
        )
        return asyncio.create_task(self.exports.export(tenant, request, MODEL))

    async def until_merging(self) -> None:
        while not self.merged:
            await asyncio.sleep(0.001)


async def test_tenants_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merging = Merging(tmp_path, monkeypatch)
    async with asyncio.timeout(LIMIT_S):
        flood = [merging.export("a", number) for number in range(5)]
        await merging.until_merging()
        await asyncio.sleep(0.1)  # all of them wait
        other = merging.export("b", 0)
        await asyncio.sleep(0.1)
        merging.gate.set()
        await asyncio.gather(*flood, other)

    assert merging.merged.index("b") <= 2


async def test_a_merged_model_is_in_its_tenants_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging(tmp_path, monkeypatch, quota_bytes=1)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreQuotaExceeded):
            await merging.export("a", 0)
    assert merging.merged == []


async def test_how_far_an_export_is_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging(tmp_path, monkeypatch)
    async with asyncio.timeout(LIMIT_S):
        first, second = merging.export("a", 0), merging.export("a", 1)
        await merging.until_merging()
        await asyncio.sleep(0.1)
        states = [await merging.exports.progress("a", f"run-a-{number}") for number in range(2)]
        assert {state.written_bytes for state in states} == {6, None}  # one after the other
        assert [state.made for state in states] == [None, None]
        with pytest.raises(NotFound):
            await merging.exports.progress("b", "run-a-0")

        merging.gate.set()
        made = await asyncio.gather(first, second)
        for number, manifest in enumerate(made):
            assert (await merging.exports.progress("a", f"run-a-{number}")).made == manifest


async def test_who_was_cut_off_can_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging(tmp_path, monkeypatch, linger_s=0.3)
    async with asyncio.timeout(LIMIT_S):
        first = merging.export("a", 0)
        await merging.until_merging()
        first.cancel()
        await asyncio.wait([first])
        again = merging.export("a", 0)
        await asyncio.sleep(0.6)  # the one who left is counted no more
        merging.gate.set()
        await again
        assert merging.merged == ["a"]


async def test_what_nobody_comes_back_for_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging(tmp_path, monkeypatch, linger_s=0.05)
    async with asyncio.timeout(LIMIT_S):
        first = merging.export("a", 0)
        await merging.until_merging()
        first.cancel()
        with suppress(NotFound):
            while await merging.exports.progress("a", "run-a-0"):
                await asyncio.sleep(0.01)


def test_the_size_of_what_goes_meanwhile_is_of_what_is_still_there(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"abc")
    assert exports._size_bytes(tmp_path) == 3
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # listed, but not there to be asked
    assert exports._size_bytes(tmp_path) in (0, 3)
    assert exports._size_bytes(tmp_path / "published") == 0
