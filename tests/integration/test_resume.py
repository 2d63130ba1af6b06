"""Runs that go on from their checkpoints, against one that was never stopped.

Bitwise on CPU: uninterrupted == saved and resumed with the optimizer != resumed without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import mint
from checkpoint_store import CheckpointStore
from mint import types
from tests.servers import running_trainer

LIMIT_S = 120.0
BEFORE, AFTER = 3, 4  # steps
PARAMS = types.AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=1.0)
Weights = dict[str, np.ndarray]


def batch(step: int) -> list[types.Datum]:
    rng = np.random.default_rng(step)
    data = []
    for n in (9, 23, 4):
        inputs = {
            "target_tokens": rng.integers(0, 512, n),
            "weights": (rng.random(n) < 0.7).astype(np.float32),
        }
        tokens = rng.integers(0, 512, n).tolist()
        data.append(types.Datum(types.ModelInput.from_ints(tokens), inputs))
    return data


def train(run: mint.TrainingClient, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        run.forward_backward(batch(step))
        run.optim_step(PARAMS)


def weights(run: mint.TrainingClient, store: Path) -> Weights:
    path = run.save_weights_for_sampler("end").result(LIMIT_S).revision_path
    return CheckpointStore(store).open(path, tenant="default").weights()


def equal(ours: Weights, wanted: Weights) -> bool:
    assert ours.keys() == wanted.keys()
    return all(np.array_equal(ours[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume-store")


@contextmanager
def serving(model: Path, store: Path, **flags: object) -> Iterator[mint.ServiceClient]:
    """A trainer of its own, and a client of it. Two on one store need states of their own."""
    with (
        running_trainer(model, store, base_model_name="tiny", **flags) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def saved(qwen3_folder: Path, store: Path) -> tuple[str, Weights]:
    """Where a run was saved after some steps, and its weights after some more, uninterrupted. The
    server that it ran on is gone.
    """
    with serving(qwen3_folder, store) as service:
        run = service.create_lora_training_client(rank=4, seed=3)
        train(run, 0, BEFORE)
        path = run.save_state("middle").result(LIMIT_S).path
        train(run, BEFORE, AFTER)
        return path, weights(run, store)


@pytest.fixture(scope="module")
def restarted(
    qwen3_folder: Path, store: Path, saved: tuple[str, Weights]
) -> Iterator[mint.ServiceClient]:
    """The server once more, on the same store."""
    with serving(qwen3_folder, store) as service:
        yield service


def test_resuming_with_the_optimizer_equals_never_stopping(
    restarted: mint.ServiceClient, store: Path, saved: tuple[str, Weights]
) -> None:
    path, uninterrupted = saved
    created = restarted.create_training_client_from_state_with_optimizer(path)
    loaded = restarted.create_lora_training_client(rank=4, seed=99)
    train(loaded, 100, 1)  # which leaves nothing behind
    assert loaded.load_state_with_optimizer(path).result(LIMIT_S).step == BEFORE

    for run in (created, loaded):
        train(run, BEFORE, AFTER)
        assert equal(weights(run, store), uninterrupted)


def test_resuming_without_the_optimizer_is_another_run(
    restarted: mint.ServiceClient, store: Path, saved: tuple[str, Weights]
) -> None:
    path, uninterrupted = saved
    created = restarted.create_training_client_from_state(path)
    loaded = restarted.create_lora_training_client(rank=4, seed=99)
    train(loaded, 100, 1)
    loaded.load_state(path)

    ends = []
    for run in (created, loaded):
        train(run, BEFORE, AFTER)
        ends.append(weights(run, store))
    assert equal(*ends)
    assert not equal(ends[0], uninterrupted)


def test_a_second_server_on_the_same_store_resumes_too(
    restarted: mint.ServiceClient,
    qwen3_folder: Path,
    store: Path,
    saved: tuple[str, Weights],
    tmp_path: Path,
) -> None:
    path, uninterrupted = saved
    with serving(qwen3_folder, store, state=tmp_path / "state") as second:
        run = second.create_training_client_from_state_with_optimizer(path, base_model="tiny")
        train(run, BEFORE, AFTER)

        assert equal(weights(run, store), uninterrupted)


def test_a_base_model_that_is_not_served_is_refused(
    restarted: mint.ServiceClient, saved: tuple[str, Weights]
) -> None:
    with pytest.raises(mint.NotFoundError, match="other/model"):
        restarted.create_training_client_from_state(saved[0], base_model="other/model")
