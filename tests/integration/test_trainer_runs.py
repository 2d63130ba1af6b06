"""Runs are made, listed, changed and deleted."""

import uuid
from typing import Any

import grpc
import pytest

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.integration.conftest import KeyedTrainer
from tests.trainer_rpc import RawRun, create, create_request, lora_config, refused

Stub = trainer_pb2_grpc.TrainerServiceStub
List = trainer_pb2.ListTrainingRunsRequest
TrainingRun = trainer_pb2.TrainingRun


def new_id() -> str:
    return uuid.uuid4().hex


def test_a_new_run_says_what_it_is(trainer_stub: Stub) -> None:
    run = create(trainer_stub, metadata={"team": "a"}, lora_config=lora_config(seed=7)).run

    assert run.base_model == "tiny"
    assert len(run.base_fingerprint) == 64
    assert (run.lora_config.rank, run.lora_config.seed, run.lora_config.alpha) == (4, 7, 32)
    assert run.metadata == {"team": "a"}
    assert run.state == TrainingRun.STATE_ACTIVE
    assert (run.step, run.next_sequence, run.gradient_pending) == (0, 1, False)
    assert "lm_head" in run.trained_modules
    assert run.trainable_parameter_count > 0
    assert run.create_time == run.update_time


def test_a_seed_is_drawn_and_told(trainer_stub: Stub) -> None:
    config = lora_config()
    config.ClearField("seed")

    seeds = {create(trainer_stub, lora_config=config).run.lora_config.seed for _ in range(3)}

    assert len(seeds) == 3


def test_the_switches_choose_the_modules(trainer_stub: Stub) -> None:
    config = lora_config(train_mlp=False, train_unembed=False)

    modules = create(trainer_stub, lora_config=config).run.trained_modules

    assert {name.rsplit(".", 1)[-1] for name in modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_the_same_request_makes_one_run(trainer_stub: Stub) -> None:
    request = create_request()

    first = trainer_stub.CreateTrainingRun(request)
    assert trainer_stub.CreateTrainingRun(request) == first

    request.metadata["a"] = "b"
    error = refused(trainer_stub.CreateTrainingRun, request)
    assert error.code == grpc.StatusCode.ALREADY_EXISTS
    assert error.reason == "REQUEST_ID_REUSED"


def test_listing_pages_through_the_runs_newest_first(trainer_stub: Stub) -> None:
    group = {"group": new_id()}
    made = [create(trainer_stub, metadata=group | {"n": str(n)}).id for n in range(5)]

    pages, token = [], ""
    while True:
        page = trainer_stub.ListTrainingRuns(
            List(page_size=2, page_token=token, metadata_filter=group)
        )
        pages.append([run.training_run_id for run in page.training_runs])
        token = page.next_page_token
        if not token:
            break

    assert [len(page) for page in pages] == [2, 2, 1]
    assert [run_id for page in pages for run_id in page] == made[::-1]
    only = trainer_stub.ListTrainingRuns(List(metadata_filter=group | {"n": "3"}))
    assert [run.training_run_id for run in only.training_runs] == [made[3]]


def test_runs_made_meanwhile_do_not_shift_pages(trainer_stub: Stub) -> None:
    group = {"group": new_id()}
    made = [create(trainer_stub, metadata=group).id for _ in range(3)]
    first = trainer_stub.ListTrainingRuns(List(page_size=2, metadata_filter=group))
    create(trainer_stub, metadata=group)

    second = trainer_stub.ListTrainingRuns(
        List(page_size=2, page_token=first.next_page_token, metadata_filter=group)
    )

    assert [run.training_run_id for run in second.training_runs] == [made[0]]


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (List(page_size=-1), "page_size", "is -1 but must be 0 to 1000"),
        (List(page_token="x"), "page_token", "was not given for this filter"),
    ],
)
def test_bad_lists(trainer_stub: Stub, request_: List, field: str, words: str) -> None:
    error = refused(trainer_stub.ListTrainingRuns, request_)

    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == field
    assert words in error.message


def test_metadata_are_replaced(run: RawRun) -> None:
    request = trainer_pb2.UpdateTrainingRunRequest(
        training_run_id=run.id, request_id=new_id(), metadata={"b": "2"}
    )

    answer = run.stub.UpdateTrainingRun(request)

    assert answer.training_run.metadata == {"b": "2"}
    assert run.describe().metadata == {"b": "2"}


def delete(run: RawRun, **options: bool) -> None:
    run.stub.DeleteTrainingRun(
        trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.id, request_id=new_id(), **options)
    )


def test_a_deleted_run_is_gone_and_its_named_checkpoints_stay(run: RawRun) -> None:
    named = run.send(run.save_state("kept")).path
    unnamed = run.send(run.save_for_sampler()).path
    early = run.start(run.discard(sequence=9))

    delete(run)

    gone = run.refused(run.discard())
    assert gone.code == grpc.StatusCode.NOT_FOUND
    assert gone.reason == "TRAINING_RUN_NOT_FOUND"
    assert early.code() == grpc.StatusCode.NOT_FOUND
    start = trainer_pb2.CheckpointSource(path=named)
    assert create(run.stub, checkpoint=start).run.step == 0
    missing = refused(
        run.stub.CreateTrainingRun,
        create_request(checkpoint=trainer_pb2.CheckpointSource(path=unnamed)),
    )
    assert missing.reason == "CHECKPOINT_NOT_FOUND"


def test_a_run_can_be_deleted_with_its_checkpoints(run: RawRun) -> None:
    path = run.send(run.save_state("a")).path

    delete(run, delete_checkpoints=True)

    error = refused(
        run.stub.CreateTrainingRun,
        create_request(checkpoint=trainer_pb2.CheckpointSource(path=path)),
    )
    assert error.code == grpc.StatusCode.NOT_FOUND
    assert error.metadata == {"path": path}


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a\0b", "x" * 129, "-a", "a b"])
def test_what_cannot_name_a_run_is_refused_by_every_rpc(trainer_stub: Stub, name: str) -> None:
    """Before anything is looked for under it."""
    service = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"]
    methods = [m for m in service.methods if "training_run_id" in m.input_type.fields_by_name]
    assert len(methods) > 10
    for method in methods:
        fields = {"training_run_id": name}
        known = method.input_type.fields_by_name
        fields |= {"request_id": "id"} if "request_id" in known else {}
        fields |= {"sequence": 1, "writer_epoch": 1} if "sequence" in known else {}  # type: ignore[dict-item]
        request = getattr(trainer_pb2, method.input_type.name)(**fields)
        call = getattr(trainer_stub, method.name)
        error = refused(lambda *a, call=call, **o: list(streamed(call(*a, **o))), request)
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "training_run_id")


def streamed(answer: Any) -> Any:
    """What a call answers with, one message or many."""
    return answer if isinstance(answer, grpc.RpcContext) else [answer]


def test_an_unknown_run(trainer_stub: Stub) -> None:
    error = RawRun(trainer_stub, TrainingRun(training_run_id="run-404"), 1)

    for refused_ in (
        error.refused(error.forward_backward()),
        refused(
            trainer_stub.GetTrainingRun,
            trainer_pb2.GetTrainingRunRequest(training_run_id="run-404"),
        ),
    ):
        assert refused_.code == grpc.StatusCode.NOT_FOUND
        assert refused_.reason == "TRAINING_RUN_NOT_FOUND"
        assert refused_.metadata == {"training_run_id": "run-404"}


def test_a_key_is_needed_where_keys_are_asked_for(keyed_trainer: KeyedTrainer) -> None:
    wrong = {"metadata": [("authorization", "Bearer sk-mint-wrong")]}
    for options in ({}, wrong):
        error = refused(keyed_trainer.stub.CreateTrainingRun, create_request(), **options)
        assert error.code == grpc.StatusCode.UNAUTHENTICATED


def test_a_tenant_sees_its_own_alone(keyed_trainer: KeyedTrainer) -> None:
    stub = keyed_trainer.stub
    ann, bob = keyed_trainer.options("ann"), keyed_trainer.options("bob")
    anns = create(stub, ann)
    path = anns.send(anns.save_state("a")).path

    as_bob = RawRun(stub, anns.run, anns.writer_epoch, options=bob)
    error = as_bob.refused(as_bob.forward_backward())
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TRAINING_RUN_NOT_FOUND")
    assert not stub.ListTrainingRuns(List(), **bob).training_runs
    assert anns.id in [
        run.training_run_id for run in stub.ListTrainingRuns(List(), **ann).training_runs
    ]

    bobs = create(stub, bob)
    error = bobs.refused(bobs.load_state(path))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
    assert anns.describe().next_sequence == 2  # nothing of it was touched


def test_tenants_choose_request_ids_for_themselves(keyed_trainer: KeyedTrainer) -> None:
    request = create_request(request_id="the same")
    answers = [
        keyed_trainer.stub.CreateTrainingRun(request, **keyed_trainer.options(tenant))
        for tenant in ("bob", "default")
    ]

    assert len({answer.training_run.training_run_id for answer in answers}) == 2


def test_keys_stay_out_of_the_log(keyed_trainer: KeyedTrainer) -> None:
    create(keyed_trainer.stub, keyed_trainer.options("bob"))

    log = keyed_trainer.service.log_text()

    assert "method=CreateTrainingRun tenant=bob code=OK" in log
    assert not any(key in log for key in keyed_trainer.keys.values())
