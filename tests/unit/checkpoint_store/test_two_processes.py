"""Processes that save under one name at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore
from tests.checkpoint_files import parts_of, same
from tests.unit.checkpoint_store.conftest import adapter

SAVES = 12  # of each process
WRITERS = 3

# Saves under the names a-0, a-1, ... as soon as the others do: each is the step `first + number`.
_WRITER = """
import sys
from pathlib import Path
from checkpoint_store import CheckpointStore
from mint_core.errors import AlreadyExists
from tests.checkpoint_files import publish_checkpoint
from tests.unit.checkpoint_store.conftest import SPEC, adapter
root, first, saves, overwrite = Path(sys.argv[1]), *map(int, sys.argv[2:])
store = CheckpointStore(root)
print("ready", flush=True)
for number in range(saves):
    sys.stdin.readline()
    try:
        made = publish_checkpoint(
            store, training_run_id="r-1", kind="weights", name=f"a-{number}", tenant="t",
            base_model="b", base_fingerprint="f", spec=SPEC, step=first + number,
            overwrite=bool(overwrite), **adapter(seed=first + number),
        )
        print(made.revision_path, flush=True)
    except AlreadyExists:
        print("refused", flush=True)
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_of_processes_that_save_one_name_each_wins_whole_or_is_refused(
    tmp_path: Path, overwrite: bool
) -> None:
    writers = [_start(tmp_path / "store", 100 * (n + 1), overwrite) for n in range(WRITERS)]
    for writer in writers:
        assert _line(writer) == "ready"
    store = CheckpointStore(tmp_path / "store")
    for number in range(SAVES):
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        answers = [_line(writer) for writer in writers]

        saved = {path: 100 * (n + 1) + number for n, path in enumerate(answers) if "mint" in path}
        assert len(saved) == (WRITERS if overwrite else 1), answers
        assert sorted(saved) == [
            f"mint://r-1/weights/a-{number}@{revision + 1}" for revision in range(len(saved))
        ]
        for path, step in saved.items():
            opened = store.open(path, tenant="t")
            assert opened.manifest.step == step
            read = parts_of(opened)
            for part, expected in adapter(seed=step).items():
                assert same(read[part], expected)
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors


def _start(root: Path, first: int, overwrite: bool) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(root), str(first), str(SAVES), str(int(overwrite))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
