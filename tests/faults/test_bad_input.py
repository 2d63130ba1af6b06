"""Bad input, as a user meets it: each gets an error that names the field and the remedy."""

import dataclasses
import hashlib
import socket
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from safetensors.numpy import load_file, save_file

import mint
from checkpoint_store.manifest import FileEntry, decode_manifest, encode_manifest
from mint import types
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.services import Services

GOOD = [5, 6, 7, 8]


def datum(tokens: list[int] = GOOD, **inputs: Any) -> types.Datum:
    filled = {"target_tokens": tokens, "weights": [1] * len(tokens), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={name: value for name, value in filled.items() if value is not None},
    )


@pytest.fixture(scope="module")
def run(module_service: mint.ServiceClient) -> mint.TrainingClient:
    return module_service.create_lora_training_client(rank=2, seed=1)


BAD_DATA: dict[str, tuple[Callable[[], types.Datum], str]] = {
    "token out of range": (lambda: datum([5, 512, 7]), r"data\[1\].*512.*vocabulary"),
    "negative target": (lambda: datum(target_tokens=[5, 6, -1, 8]), r"target_tokens.*-1"),
    "target out of range at weight 0": (
        lambda: datum(target_tokens=[600, 6, 7, 8], weights=[0, 1, 1, 1]),
        r"target_tokens.*600",
    ),
    "lengths differ": (lambda: datum(weights=[1, 1]), r"weights.*2.*4"),
    "no targets": (lambda: datum(target_tokens=None), r"data\[1\].*lacks `target_tokens`"),
    "unknown input": (lambda: datum(advantages=[1.0] * 4), r"advantages"),
    "context too long": (lambda: datum(list(range(5, 405)) * 11), r"4400.*4096"),
    "NaN weight": (lambda: datum(weights=[1, float("nan"), 1, 1]), r"weights.*(NaN|finite)"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_by_name(run: mint.TrainingClient, case: str) -> None:
    make, message = BAD_DATA[case]
    with pytest.raises((mint.BadRequestError, ValueError), match=message):
        run.forward([datum(), make()]).result()


def test_an_empty_batch_is_refused(run: mint.TrainingClient) -> None:
    with pytest.raises((mint.BadRequestError, ValueError), match=r"data.*empty|at least one"):
        run.forward([]).result()


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("grpo", None, r"grpo.*cross_entropy"),
        ("ppo", {"epsilon": 0.1}, r"epsilon.*clip_low_threshold"),
        ("dro", None, r"beta"),
        ("cross_entropy", {"beta": 0.1}, r"beta"),
        ("ppo", {"clip_low_threshold": 2.0}, r"clip_high_threshold"),
    ],
)
def test_unknown_losses_and_options_are_refused(
    run: mint.TrainingClient, loss_fn: str, config: dict[str, float] | None, message: str
) -> None:
    data = [datum(logprobs=[-1.0] * 4, advantages=[1.0] * 4)]
    if loss_fn == "cross_entropy":
        data = [datum()]
    with pytest.raises((mint.BadRequestError, ValueError), match=message):
        run.forward(data, loss_fn=loss_fn, loss_fn_config=config).result()


@pytest.mark.parametrize("rank", [0, 4096])
def test_ranks_outside_the_served_range_are_refused(service: mint.ServiceClient, rank: int) -> None:
    with pytest.raises(mint.BadRequestError, match=rf"rank` is {rank} but must be 1 to 128"):
        service.create_lora_training_client(rank=rank)


def test_an_unknown_run_is_not_found(service: mint.ServiceClient) -> None:
    with pytest.raises(mint.NotFoundError) as caught:
        service.open_training_run("r-404")
    assert caught.value.reason == "TRAINING_RUN_NOT_FOUND"
    assert caught.value.metadata["training_run_id"] == "r-404"


def test_unknown_paths_and_paths_of_the_wrong_kind(
    service: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    state = run.save_state("kinds").result().path
    sampler = run.save_weights_for_sampler("kinds").result().path
    missing = sampler.replace("/kinds", "/missing")
    with pytest.raises(mint.NotFoundError) as caught:
        service.create_sampling_client(model_path=missing).compute_logprobs(
            types.ModelInput.from_ints(GOOD)
        ).result()
    assert missing in str(caught.value)
    with pytest.raises((mint.BadRequestError, ValueError), match="sampler_weights"):
        service.create_sampling_client(model_path=state).compute_logprobs(
            types.ModelInput.from_ints(GOOD)
        ).result()
    with pytest.raises((mint.BadRequestError, ValueError), match="weights"):
        service.create_training_client_from_state_with_optimizer(sampler)
    with pytest.raises((mint.BadRequestError, ValueError), match="mint://"):
        service.create_sampling_client(model_path="/tmp/somewhere")


def test_nan_in_stored_weights_is_refused(
    service: mint.ServiceClient, run: mint.TrainingClient, services: Services
) -> None:
    """Damage that even the digests agree with: the values themselves are checked."""
    path = run.save_state("nan").result().path
    (file,) = (services.store / path.removeprefix("mint://")).rglob("adapter_model.safetensors")
    arrays = load_file(file)
    next(iter(arrays.values()))[:] = np.nan
    save_file(arrays, file)
    manifest_file = file.with_name("manifest.json")
    manifest = decode_manifest(manifest_file.read_bytes())
    entry = FileEntry(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    files = {**manifest.files, file.name: entry}
    manifest_file.write_bytes(encode_manifest(dataclasses.replace(manifest, files=files)))
    with pytest.raises(mint.APIStatusError, match="NaN"):
        service.create_training_client_from_state(path)


def test_a_datum_over_the_limit_is_refused_before_it_takes_a_number(
    service: mint.ServiceClient,
) -> None:
    run = service.create_lora_training_client(rank=1)
    data = [datum(), datum([7], weights=np.ones(75_000_000, np.float32))]  # 300 MB
    with pytest.raises(mint.BadRequestError, match=r"`data\[1\]` takes 3\d{8} bytes.*268435456"):
        run.forward(data)
    assert run.forward([datum()]).result().metrics["loss:sum"] > 0


def test_a_300_mb_message_that_is_sent_all_the_same_harms_nobody(
    services: Services, run: mint.TrainingClient
) -> None:
    """gRPC itself refuses it, without RetryInfo: sending it again would be in vain."""
    tensor = {"values": bytes(300_000_000)}
    request = trainer_pb2.ForwardRequest(
        training_run_id=run.training_run_id, data=[{"loss_fn_inputs": {"weights": tensor}}]
    )
    options = [("grpc.max_send_message_length", -1)]
    with (
        grpc.insecure_channel(services.trainer, options) as channel,
        pytest.raises(grpc.RpcError, match="larger than max") as caught,
    ):
        trainer_pb2_grpc.TrainerServiceStub(channel).Forward(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc_status.from_call(caught.value) is None
    assert run.forward([datum()]).result().metrics["loss:sum"] > 0


def test_an_unknown_wire_field_is_refused(services: Services) -> None:
    """A newer client's option must not be ignored."""
    with grpc.insecure_channel(services.trainer) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        request = trainer_pb2.ListTrainingRunsRequest.FromString(b"\xf8\x3f\x01")  # field 1023
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListTrainingRuns(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1023" in caught.value.details()


def test_a_server_that_is_down_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        mint.ServiceClient(base_url=address, timeout=2.0) as client,
        pytest.raises(mint.APIConnectionError, match=address),
    ):
        client.get_server_capabilities()


def test_one_servers_address_in_place_of_the_others_is_told(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler_for_trainer = r"is the sampler, and .* is the trainer's: set MINT_BASE_URL.* 50051"
    with mint.ServiceClient(base_url=services.sampler) as client:
        for ask in (client.list_training_runs, client.create_lora_training_client):
            with pytest.raises(mint.MintError, match=sampler_for_trainer):
                ask()
    monkeypatch.setenv("MINT_SAMPLER_URL", services.trainer)
    trainer_for_sampler = r"is the trainer, and .* is the sampler's: set MINT_SAMPLER_URL.* 50052"
    with mint.ServiceClient(base_url=services.trainer) as client:
        sampling = client.create_sampling_client()
        with pytest.raises(mint.MintError, match=trainer_for_sampler):
            sampling.sample(types.ModelInput.from_ints([1])).result()


async def test_a_refusal_between_two_backwards_refuses_the_step_and_the_run_goes_on(
    service: mint.ServiceClient,
) -> None:
    """Whether the client, behind an await, or the server refuses: no step on part of a batch."""
    for bad in ([], [datum([5, 512, 7])]):
        run = service.create_lora_training_client(rank=2)
        run.forward_backward([datum()]).result()
        with pytest.raises(mint.BadRequestError):
            await (await run.forward_backward_async(bad))
        run.forward_backward([datum()]).result()
        with pytest.raises(mint.APIStatusError, match=r"call 2 of forward_backward failed .`data"):
            run.optim_step(types.AdamParams()).result()
        run.forward_backward([datum()]).result()
        run.optim_step(types.AdamParams()).result()
        assert service.get_training_run(run.training_run_id).step == 1


def test_a_plain_call_that_raises_at_once_costs_no_step(service: mint.ServiceClient) -> None:
    run = service.create_lora_training_client(rank=2)
    with pytest.raises(mint.BadRequestError, match="cross_entrop'"):
        run.forward_backward([datum()], loss_fn="cross_entrop")
    run.forward_backward([datum()])
    assert run.optim_step().result().step == 1
