"""Saving, loading, and starting from what was saved."""

import grpc
import pytest

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2
from tests.integration.conftest import KeyedTrainer
from tests.trainer_rpc import (
    RawRun,
    create,
    create_request,
    datum,
    floats,
    lora_config,
    refused,
)

Stub = trainer_pb2_grpc.TrainerServiceStub
ADAM = types_pb2.AdamParams(learning_rate=0.01)


def train(run: RawRun, first: int, last: int) -> None:
    for step in range(first, last):
        run.send(run.forward_backward(datum([step + 3, 9, 17, 40, 8])))
        run.send(run.optim_step(adam_params=ADAM))


def logprobs(run: RawRun) -> list[float]:
    return floats(run.send(run.forward(datum([5, 6, 7, 8, 9]))).outputs[0].logprobs)


def start_from(run: RawRun, path: str, with_optimizer: bool = False) -> RawRun:
    source = trainer_pb2.CheckpointSource(path=path, with_optimizer=with_optimizer)
    return create(run.stub, checkpoint=source)


def test_save_load_continue_is_never_stopped(trainer_stub: Stub) -> None:
    whole, saved, loaded = (create(trainer_stub) for _ in range(3))
    train(whole, 0, 5)
    train(saved, 0, 3)
    path = saved.send(saved.save_state("half")).path

    answer = loaded.send(loaded.load_state(path, with_optimizer=True))
    train(loaded, 3, 5)
    made = start_from(saved, path, with_optimizer=True)
    assert made.run.step == 3
    train(made, 3, 5)

    assert answer.step == 3
    assert answer.revision_path == f"{path}@1"
    assert loaded.describe().step == 5
    assert logprobs(loaded) == logprobs(made) == logprobs(whole)


def test_loading_without_optimizer_resets_moments_and_step(trainer_stub: Stub) -> None:
    whole = create(trainer_stub)
    train(whole, 0, 3)
    path = whole.send(whole.save_state("half")).path
    loaded = create(trainer_stub)

    assert loaded.send(loaded.load_state(path)).step == 0
    assert logprobs(loaded) == logprobs(whole)
    made = start_from(whole, path)
    assert made.run.step == 0

    for run in (whole, loaded, made):
        train(run, 3, 5)
    assert logprobs(loaded) == logprobs(made)
    assert logprobs(loaded) != logprobs(whole)


def test_loading_clears_the_gradient(run: RawRun) -> None:
    path = run.send(run.save_state("start")).path
    run.send(run.forward_backward())

    saved = run.send(run.save_state("later"))
    answer = run.send(run.load_state(path))

    assert saved.gradient_pending
    assert answer.gradient_discarded
    assert run.refused(run.optim_step()).reason == "NO_GRADIENT"


def test_a_sampler_checkpoint_holds_weights_alone(run: RawRun) -> None:
    train(run, 0, 2)
    answer = run.send(run.save_for_sampler("a"))
    again = run.send(run.save_for_sampler("a"))

    assert answer.step == 2
    assert answer.path == again.path == f"mint://{run.id}/sampler_weights/a"
    assert answer.revision_path != again.revision_path
    loaded = create(run.stub)
    assert loaded.send(loaded.load_state(answer.revision_path)).step == 0
    assert logprobs(loaded) == logprobs(run)
    error = loaded.refused(loaded.load_state(answer.path, with_optimizer=True))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "no optimizer state" in error.message


def test_a_state_is_not_overwritten_unasked(run: RawRun) -> None:
    first = run.send(run.save_state("a"))

    error = run.refused(run.save_state("a"))

    assert error.code == grpc.StatusCode.ALREADY_EXISTS
    assert error.metadata["path"] == first.path
    again = run.send(run.save_state("a", overwrite=True))
    assert again.path == first.path
    assert again.revision_path == f"{first.path}@2"


def test_a_save_sent_twice_is_one(run: RawRun) -> None:
    request = run.save_for_sampler("a")

    assert run.send(request) == run.send(request)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lora_config(rank=8), "rank"),
        (lora_config(train_mlp=False), "target modules"),
        (lora_config(alpha=16), "scale of alpha and rank"),
    ],
)
def test_another_shape_does_not_fit(run: RawRun, other: types_pb2.LoraConfig, differs: str) -> None:
    path = run.send(run.save_state("a")).path
    different = create(run.stub, lora_config=other)

    error = different.refused(different.load_state(path))

    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "CHECKPOINT_MISMATCH"
    assert error.metadata["differs"] == differs
    assert start_from(run, path).run.lora_config == run.run.lora_config


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("mint://run-404/weights/a", grpc.StatusCode.NOT_FOUND, "there is no checkpoint"),
        ("mint://run-404/a", grpc.StatusCode.INVALID_ARGUMENT, "is not a checkpoint path"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "is not a checkpoint path"),
    ],
)
def test_bad_paths(run: RawRun, path: str, code: grpc.StatusCode, words: str) -> None:
    source = trainer_pb2.CheckpointSource(path=path)
    for error in (
        run.refused(run.load_state(path)),
        refused(run.stub.CreateTrainingRun, create_request(checkpoint=source)),
    ):
        assert error.code == code
        assert words in error.message


def test_a_failed_load_leaves_the_run_as_it_was(run: RawRun) -> None:
    run.send(run.forward_backward())
    run.refused(run.load_state("mint://run-404/weights/a"))

    assert run.send(run.optim_step(backward_count=1)).step == 1


def test_an_adapter_of_another_base_does_not_fit(run: RawRun, keyed_trainer: KeyedTrainer) -> None:
    path = run.send(run.save_state("a")).path
    llama = create(keyed_trainer.stub, keyed_trainer.options("default"))

    error = llama.refused(llama.load_state(path))

    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "CHECKPOINT_MISMATCH"
    assert error.metadata["checkpoint_base_model"] == "tiny"
