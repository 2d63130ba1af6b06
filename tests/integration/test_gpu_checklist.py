"""The checklist for a GPU is rehearsed on a CPU: a lent machine's minutes are for figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_checklist import PARTS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_checklist", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path), "--limit", "1700"], check=True)
    found = [json.loads(line) for line in (tmp_path / "checklist.jsonl").read_text().splitlines()]
    outcomes = {line["part"]: line["outcome"] for line in found if "outcome" in line}
    assert outcomes == dict.fromkeys(PARTS, "done")
