"""How much may wait, and when to come again."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from mint_core.backlog import Load
from mint_core.lora.spec import AdapterSpec
from mint_core.rpc.metrics import Metrics
from tests.unit.trainer_service.calls import call, compute
from trainer_service.calls import Call
from trainer_service.errors import EarlyArrivalsFull, QueueFull
from trainer_service.queue import admission
from trainer_service.queue.admission import Admission
from trainer_service.run.run import RunOrigin


def origin(tenant: str, run: str) -> RunOrigin:
    return RunOrigin(
        training_run_id=run,
        tenant=tenant,
        number=1,
        base_model="tiny",
        base_fingerprint="f",
        spec=AdapterSpec(rank=1, alpha=1.0, use_rslora=False, seed=1, modules=("lm_head",)),
        trainable_parameter_count=1,
        row_bytes=4,
        create_time=datetime.now(UTC),
        isolated=False,
        tile_tokens=16,
    )


def of_tokens(tokens: int) -> Call:
    return call(1, work=compute(tokens))


A1, A2, B1 = origin("ann", "a1"), origin("ann", "a2"), origin("bob", "b1")


class Asked:
    """Admission to a queue of 3 calls or 100 tokens, and what it asked the prediction."""

    def __init__(self, *, per_run: bool = False, wait_s: float = 2.0) -> None:
        self.asked: list[tuple[str, str | None, int]] = []
        self.wait_s = wait_s
        sound: Any = SimpleNamespace(trouble=lambda: None, refusal=lambda: None)
        self.admission = Admission(
            sound,
            sound,
            Metrics().queue_depth,
            Load(count=3, tokens=100),
            per_run=per_run,
            predict=self.predict,
        )

    def predict(self, origin: RunOrigin, alone: bool, tokens: int) -> float:
        self.asked.append((origin.tenant, origin.training_run_id if alone else None, tokens))
        return self.wait_s

    def is_full(self, run: RunOrigin) -> bool:
        return self.admission.call_refusal(run, 0) is not None


def test_a_tenants_runs_fill_one_queue() -> None:
    asked = Asked()
    for run in (A1, A2, A1):
        assert not asked.is_full(run)
        asked.admission.enter(run, call(1))

    assert asked.is_full(A1)
    assert asked.is_full(A2)
    assert not asked.is_full(B1)
    asked.admission.leave(A2, call(1))
    assert not asked.is_full(A1)


def test_without_tenants_each_run_has_a_queue() -> None:
    asked = Asked(per_run=True)
    for _ in range(3):
        asked.admission.enter(A1, call(1))

    assert asked.is_full(A1)
    assert not asked.is_full(A2)


def test_a_call_of_any_size_is_taken_while_there_is_room() -> None:
    asked = Asked()
    asked.admission.enter(A1, of_tokens(99))
    assert not asked.is_full(A1)
    asked.admission.enter(A1, of_tokens(1000))
    assert asked.is_full(A1)

    asked.admission.leave(A1, of_tokens(1000))
    assert not asked.is_full(A1)
    asked.admission.leave(A1, of_tokens(99))
    asked.admission.enter(A1, of_tokens(5000))  # alone, however large
    assert asked.is_full(A1)


def test_the_refusal_says_when_there_will_be_room() -> None:
    asked = Asked()
    for _ in range(2):
        asked.admission.enter(A1, of_tokens(60))

    error = asked.admission.call_refusal(A2, 0)

    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 2.0
    assert error.metadata == {
        "calls": "2",
        "tokens": "120",
        "max_calls": "3",
        "max_tokens": "100",
    }
    asked.admission.call_refusal(A2, 3)  # three calls of about 60 tokens go before
    assert asked.asked == [("ann", None, 60), ("ann", None, 60 + 3 * 60)]
    asked.admission.enter(A1, of_tokens(500))
    asked.admission.call_refusal(A1, 0)
    assert asked.asked[-1] == ("ann", None, 521)  # then 99 tokens are left


def test_the_wait_is_neither_a_storm_nor_an_age() -> None:
    for wait_s, told_s in ((0.0, 0.1), (3600.0, 10.0)):
        asked = Asked(per_run=True, wait_s=wait_s)
        asked.admission.enter(A1, of_tokens(100))

        error = asked.admission.call_refusal(A1, 0)

        assert isinstance(error, QueueFull)
        assert error.retry_after_s == told_s
        assert asked.asked == [("ann", "a1", 100)]


def test_early_arrivals_hold_so_much_of_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "HELD_BYTES", 100)
    asked = Asked().admission
    large = replace(call(7), payload=b"x" * 80)
    assert asked.hold(A1, large) is None
    refusal = asked.hold(A2, large)
    assert isinstance(refusal, EarlyArrivalsFull)
    assert refusal.retry_after_s is not None
    assert asked.hold(B1, large) is None
    asked.unhold(A1, large)
    assert asked.hold(A2, replace(large, payload=b"x" * 1000)) is None  # one is never too large
