"""Rows that are fetched ahead of their passes are what they were, whatever was hinted and whatever
happens between hint and use; and together rows take no more than they may.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint_core.errors import EngineFault
from mint_core.lora import bank
from mint_core.lora.bank import Part
from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import EngineRun, make_documents, make_engine
from tests.late_copies import LateCopies
from trainer_service.engine import row_files
from trainer_service.engine.ahead import Ahead
from trainer_service.engine.engine import Engine
from trainer_service.engine.moves import HostMoves
from trainer_service.jobs import (
    AdamParams,
    ClearGradient,
    CrossEntropy,
    DropRow,
    Plan,
    StepRow,
    StepRows,
    TileResult,
)

PARAMS = AdamParams(learning_rate=1e-2)
RANKS = (8, 8, 16, 8, 16, 8)
NAMES = [f"r{i}" for i in range(len(RANKS))]
PART_BYTES = 4 * 8 * 2624  # of rank 8
LIMIT_BYTES = 11 * PART_BYTES
HOST_BYTES = 20 * PART_BYTES
CPU = torch.device("cpu")


def short(folder: Path, **changes: object) -> Engine:
    """An engine that has room for a few of the rows."""
    return make_engine(folder, **{"row_memory_bytes": LIMIT_BYTES, **changes})  # type: ignore[arg-type]


def copying(folder: Path) -> Engine:
    """With host memory below, as beside a GPU, and copies as late as they may be."""
    engine = short(folder, host_row_memory_bytes=HOST_BYTES)
    rows = engine._rows
    rows.ahead = Ahead(rows._device, HostMoves(rows._host, LateCopies(), CPU))
    return engine


def fetches(engine: Engine) -> Counter[str]:
    return Counter(engine.counts().fetches)


def finish(engine: Engine) -> None:
    """Waits for what is under way."""
    for move in engine._rows.ahead._under_way.values():
        move.ending.result()


@dataclass(frozen=True)
class Act:
    """What is done to the runs of these numbers, and which are said to come next."""

    kind: str
    runs: tuple[int, ...]
    coming: tuple[str, ...]


ACTS = st.builds(
    Act,
    st.sampled_from(["pass", "pass", "forward", "step", "clear", "load", "renew", "save", "write"]),
    st.lists(st.integers(0, len(RANKS) - 1), min_size=1, max_size=3, unique=True).map(tuple),
    st.lists(st.sampled_from([*NAMES, "gone"]), max_size=5).map(tuple),
)


class Tenants:
    """The runs of one engine."""

    def __init__(self, engine: Engine, *, hinted: bool) -> None:
        self.engine, self._hinted = engine, hinted
        self.runs = [self._make(i) for i in range(len(RANKS))]
        self._seed = 0

    def _make(self, number: int) -> EngineRun:
        request = LoraRequest(rank=RANKS[number], seed=number)
        return EngineRun(self.engine, NAMES[number], request, random=number)

    def do(self, act: Act) -> object:
        """What comes of it, to be compared."""
        self._seed += 1
        coming = act.coming if self._hinted else ()
        runs = [self.runs[i] for i in act.runs]
        match act.kind:
            case "pass" | "forward":
                tiles = [
                    run.tile(
                        make_documents(self._seed + i, (5, 3)),
                        CrossEntropy(),
                        backward=act.kind == "pass",
                    )
                    for i, run in enumerate(runs)
                ]
                results = self.engine.run(Plan(tuple(tiles), coming))
                assert isinstance(results, tuple)
                return [logprobs_of(each) for each in results]
            case "step":
                steps = tuple(StepRow(run.name, PARAMS) for run in runs)
                return self.engine.run(StepRows(steps, coming))
            case "clear":
                return [self.engine.run(ClearGradient(run.name)) for run in runs]
            case "load":
                for run in runs:
                    run.load(run.export())
            case "renew":
                for i in act.runs:
                    self.engine.run(DropRow(NAMES[i]))
                    self.runs[i] = self._make(i)
            case "save":
                return [vectors(run) for run in runs]
            case "write":
                return [
                    each.tobytes() for run in runs for each in run.export(False).weights.values()
                ]
        return None

    def end(self) -> None:
        for name in NAMES:
            self.engine.run(DropRow(name))


def logprobs_of(result: TileResult) -> list[bytes]:
    assert result.error is None
    return [each.tobytes() for each in result.logprobs]


def vectors(run: EngineRun) -> dict[str, bytes]:
    """All that is kept of a run, by part."""
    file = run.saved()
    return {part: file.read(part).tobytes() for part in file.digests}


@pytest.fixture(scope="module", params=[short, copying], ids=["files", "host memory"])
def engines(request: pytest.FixtureRequest, qwen3_folder: Path) -> tuple[Engine, Engine]:
    """One that is hinted to, and one in which all rows have room."""
    return request.param(qwen3_folder), make_engine(qwen3_folder)


@settings(max_examples=30)
@given(acts=st.lists(ACTS, min_size=5, max_size=25))
def test_whatever_was_hinted_every_bit_is_what_it_would_be(
    engines: tuple[Engine, Engine], acts: list[Act]
) -> None:
    hinted, resident = (Tenants(engine, hinted=i == 0) for i, engine in enumerate(engines))
    for act in acts:
        ours, theirs = hinted.do(act), resident.do(act)
        assert ours == theirs, act
        assert engines[0]._rows._device.held_bytes <= LIMIT_BYTES
    assert [vectors(run) for run in hinted.runs] == [vectors(run) for run in resident.runs]
    counts = engines[0].row_counts()
    assert counts.device + counts.host + counts.disk == len(RANKS)
    hinted.end(), resident.end()
    counts = engines[0].row_counts()
    assert (counts.device, counts.host, counts.disk) == (0, 0, 0)


def trained(engine: Engine, *numbers: int) -> list[EngineRun]:
    """Runs that have moments, so that few fit."""
    tenants = Tenants(engine, hinted=True)
    for i in numbers:
        tenants.do(Act("pass", (i,), ()))
        tenants.do(Act("step", (i,), ()))
    return tenants.runs


def plan(run: EngineRun, *coming: str) -> Plan:
    return Plan((run.tile(make_documents(1, (5,)), CrossEntropy(), backward=False),), coming)


@pytest.mark.parametrize("make", [short, copying])
def test_a_hinted_row_is_there_before_its_pass_asks(
    qwen3_folder: Path, make: Callable[[Path], Engine]
) -> None:
    engine = make(qwen3_folder)
    runs = trained(engine, 0, 1, 3, 5)
    away = runs[0]
    before = fetches(engine)
    engine.run(plan(runs[5], away.name))
    finish(engine)
    engine.run(plan(away))
    assert fetches(engine) - before == Counter(early=1)


def test_without_hints_it_is_asked_for(qwen3_folder: Path) -> None:
    engine = short(qwen3_folder)
    runs = trained(engine, 0, 1, 3, 5)
    before = fetches(engine)
    engine.run(plan(runs[0]))
    assert fetches(engine) - before == Counter(asked=1)


def test_a_hint_in_vain_is_counted_and_leaves_with_its_row(qwen3_folder: Path) -> None:
    engine = short(qwen3_folder)
    runs = trained(engine, 0, 1, 3, 5)
    engine.run(plan(runs[5], runs[0].name, "unknown"))
    finish(engine)
    engine.run(plan(runs[5], runs[0].name))
    engine.run(DropRow(runs[0].name))
    assert fetches(engine)["unused"] >= 1
    engine.run(plan(runs[5], runs[0].name))
    assert not engine._rows.ahead._under_way


def test_what_has_all_rows_on_the_device_begins_nothing(qwen3_folder: Path) -> None:
    engine = make_engine(qwen3_folder)
    runs = trained(engine, 0, 1)
    for run in runs:
        engine.run(plan(run, *NAMES))
    assert engine.counts().fetches == {}
    assert not engine._rows.ahead._under_way


def test_the_running_rows_and_those_hinted_before_stay(qwen3_folder: Path) -> None:
    engine = short(qwen3_folder)
    runs = trained(engine, 0, 1, 3, 5)
    wanted = [(name, frozenset(Part)) for name in (NAMES[0], NAMES[1], NAMES[3])]
    engine._rows.here(NAMES[5], *Part)
    keep = {(NAMES[5], part) for part in Part}
    engine._rows.ahead.expect(wanted, keep)
    finish(engine)
    engine._rows.ahead.stop()
    held = [set(engine._rows[run.name].row.held) for run in runs]
    assert held[5] == set(Part)
    assert held[0] == set(Part) - {Part.GRADIENT}  # which is zero, and has room
    assert (len(held[1]), len(held[3])) == (3, 0)


def test_room_that_is_left_counts_what_is_under_way(qwen3_folder: Path) -> None:
    engine = copying(qwen3_folder)
    runs = trained(engine, 0, 1, 3, 5)
    engine.run(DropRow(NAMES[3]))
    rows, ahead = engine._rows._device, engine._rows.ahead
    engine.run(plan(runs[5], NAMES[0]))
    coming = [move for move in ahead._under_way.values() if not move.leaving]
    free_bytes = LIMIT_BYTES - rows.held_bytes - sum(move.size_bytes for move in coming)
    assert coming
    assert ahead.has_room(free_bytes)
    assert not ahead.has_room(free_bytes + 1)


def test_memory_of_rows_stays_within_its_bound_at_every_moment(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All vectors are counted, from wherever they are asked for, until nobody has them."""
    live: dict[int, int] = {}
    peaks: list[int] = []

    def counted(size: int, device: torch.device) -> Tensor:
        array = np.zeros(size, np.float32)
        live[id(array)] = array.nbytes
        weakref.finalize(array, live.pop, id(array))
        peaks.append(sum(list(live.values())))
        return torch.from_numpy(array)

    engine = short(qwen3_folder)
    monkeypatch.setattr(bank, "zero_vector", counted)
    monkeypatch.setattr(row_files, "zero_vector", counted)
    tenants = Tenants(engine, hinted=True)
    random = np.random.default_rng(7)
    for _ in range(200):
        order = random.permutation(len(RANKS)).tolist()
        coming = tuple(NAMES[i] for i in order[1:4])
        tenants.do(Act("pass", (order[0],), coming))
        tenants.do(Act("step", (order[0],), coming))
    assert fetches(engine)["early"] + fetches(engine)["late"] > 100
    assert max(peaks) <= LIMIT_BYTES


def test_a_full_disk_behind_a_hint_loses_nothing(qwen3_folder: Path, tmp_path: Path) -> None:
    engine = short(qwen3_folder, row_folder=tmp_path)
    runs = trained(engine, 0, 1, 3, 5)
    expected = [vectors(run) for run in runs]
    (folder,) = tmp_path.iterdir()
    written = {file.name for file in folder.iterdir()}
    full = [f"{run.name}.{part}.row" for run in runs for part in Part]
    for name in set(full) - written:
        (folder / name).symlink_to("/dev/full")
    engine.run(plan(runs[5], runs[0].name, runs[1].name))
    engine._rows.ahead.stop()
    for name in full:
        if (folder / name).is_symlink():
            (folder / name).unlink()
    assert [vectors(run) for run in runs] == expected


def test_a_damaged_file_is_told_to_its_own_pass_alone(qwen3_folder: Path, tmp_path: Path) -> None:
    engine = short(qwen3_folder, row_folder=tmp_path)
    runs = trained(engine, 0, 1, 3, 5)
    (file,) = tmp_path.glob(f"*/{NAMES[0]}.weights.row")
    file.write_bytes(file.read_bytes()[:-4])
    for run, coming in ((runs[5], NAMES[0]), (runs[5], NAMES[1])):
        (result,) = engine.run(plan(run, coming))  # type: ignore[misc]
        assert result.error is None
    (result,) = engine.run(plan(runs[0]))  # type: ignore[misc]
    assert isinstance(result.error, EngineFault)
    assert result.error.metadata["training_run_id"] == NAMES[0]


def test_moments_come_for_the_step_that_follows_as_many_passes_as_before(
    qwen3_folder: Path,
) -> None:
    engine = short(qwen3_folder)
    tenants = Tenants(engine, hinted=True)

    def asked_in_step(passes: int) -> int:
        """How many parts of a row that was away its step behind so many passes has to wait for."""
        for number in (2, 4):
            tenants.do(Act("pass", (number,), ()))
            tenants.do(Act("step", (number,), ()))
        for _ in range(passes):
            tenants.do(Act("pass", (0,), ()))
            finish(engine)
        before = fetches(engine)["asked"]
        tenants.do(Act("step", (0,), ()))
        return fetches(engine)["asked"] - before

    asked_in_step(2)
    assert asked_in_step(2) == 0
    assert asked_in_step(1) == 2  # its moments: another pass was expected
    assert asked_in_step(1) == 0
