"""Seeded messages to every RPC: no INTERNAL, no engine ended. `make fuzz` sends 100,000."""

import os
from contextlib import ExitStack
from pathlib import Path

from tests.hostile.fuzz import fuzz
from tests.hostile.stage import staged

COUNT = int(os.environ.get("FUZZ_COUNT", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
RUNS = 3


def test_any_message_is_answered_as_the_contract_says(qwen3_folder: Path, tmp_path: Path) -> None:
    with staged(qwen3_folder, tmp_path, 1) as stage, ExitStack() as runs:
        names = [runs.enter_context(stage.hostile.run()) for _ in range(RUNS)]
        engines = stage.engines()
        codes = fuzz(stage.hostile, names, SEED, COUNT)
        assert sum(codes.values()) == COUNT
        assert stage.engines() == engines
        logs = "".join(stage.logs())
        assert "Traceback" not in logs
        runs.pop_all()  # they may be gone by now
