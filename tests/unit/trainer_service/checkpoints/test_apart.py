"""Work in a process of its own."""

import asyncio
import os

import pytest

from mint_core.lora.spec import AdapterSpec
from trainer_service.checkpoints import apart
from trainer_service.checkpoints.apart import Merge, do_apart

JOB = Merge(
    base_folder="",
    adapter_folder="",
    spec=AdapterSpec(rank=1, alpha=1, use_rslora=False, seed=0, modules=()),
    output_folder="",
    dtype="",
    threads=1,
)


async def test_the_process_ends_with_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[asyncio.subprocess.Process] = []
    real = asyncio.create_subprocess_exec

    async def watched(*arguments: object, **options: object) -> asyncio.subprocess.Process:
        made.append(await real("sleep", "3600", **options))  # type: ignore[arg-type]
        return made[0]

    monkeypatch.setattr(apart.asyncio, "create_subprocess_exec", watched)
    work = asyncio.create_task(do_apart("none", JOB))
    while not made:
        await asyncio.sleep(0.01)
    work.cancel()
    await asyncio.wait([work])

    assert made[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(made[0].pid, 0)
