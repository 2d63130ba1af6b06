"""The real engine: uninterrupted, killed and recovered, saved and resumed give the same bits."""

from pathlib import Path
from typing import Any

import mint
from checkpoint_store import CheckpointStore
from mint import types
from tests.checkpoint_files import parts_of
from tests.models import VOCABULARY_SIZE
from tests.supervised import Supervised, supervised
from tests.training_load import LIMIT_S, batch, train_all

USERS, STEPS = 3, 8
State = dict[str, Any]


def state_at(store: Path, path: str) -> State:
    """All numbers of a saved state, as bytes."""
    opened = CheckpointStore(store).open(path, tenant="default")
    state = {
        f"{part} {name}": array.tobytes()
        for part, arrays in parts_of(opened).items()
        for name, array in arrays.items()
    }
    return state | {"step": opened.manifest.step}


def finished(run: mint.TrainingClient, steps: range, store: Path) -> State:
    """The state after more steps of the same script."""
    for step in steps:
        run.forward_backward(batch(step, VOCABULARY_SIZE, [40, 9, 17]))
        run.optim_step(types.AdamParams(learning_rate=0.01)).result(LIMIT_S)
    return state_at(store, run.save_state(f"step-{steps.stop}").result(LIMIT_S).path)


def killing(service: Supervised) -> Any:
    """Kills the engine, the front, and both while the second restores what the first has left."""
    kills = {
        5: service.kill_engine,
        14: service.kill,
        22: lambda: (service.kill_engine(), service.kill()),
    }

    def kill(user: int, answers: int) -> None:
        if user == 0 and answers in kills:
            kills.pop(answers)()

    return kill


def test_three_ways_to_the_same_weights(qwen3_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with supervised(
        "trainer_service",
        tmp_path,
        base_model=qwen3_folder,
        base_model_name="tiny",
        device="cpu",
        max_batch_tokens=256,
        snapshot_s=0.3,
    ) as service:
        undisturbed = train_all(service.address, USERS, STEPS, VOCABULARY_SIZE)
        assert service.starts == 1
        with mint.ServiceClient(base_url=service.address) as client:
            run = client.create_lora_training_client(rank=4, seed=5)
            half, whole = finished(run, range(4), store), finished(run, range(4, 8), store)

        disturbed = train_all(service.address, USERS, STEPS, VOCABULARY_SIZE, killing(service))

        assert service.starts == 3
        for (answers, path), (others, other) in zip(disturbed, undisturbed, strict=True):
            assert answers == others
            assert state_at(store, path) == state_at(store, other)
        with mint.ServiceClient(base_url=service.address) as client:
            states = client.get_training_run(run.training_run_id)
            assert states.step == 8
            path = f"mint://{run.training_run_id}/weights/step-4"
            resumed = client.create_training_client_from_state_with_optimizer(path)
            fresh = client.create_training_client_from_state(path)
            service.kill()  # a run that starts from a checkpoint is recovered like any other
            assert finished(resumed, range(4, 8), store) == whole
            other_weights = finished(fresh, range(4, 8), store)
        assert half["step"] == 4
        assert other_weights["step"] == 4  # the optimizer began anew, and the result shows it
        assert other_weights != whole
        assert "inexactly" not in service.log_text()
