"""Servers that are absent, foreign or of another version; keys and headers."""

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import mint
from mint._threads import timer
from mintrpc.v1 import model_pb2
from tests.unit.mint.faulty_server import Code, Fault, Server, running

LIMIT_S = 20.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_is_down_fails_clearly() -> None:
    address = free_address()

    with (
        mint.ServiceClient(base_url=address, timeout=0.5) as service,
        pytest.raises(mint.APIConnectionError) as caught,
    ):
        service.create_lora_training_client()

    assert address in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "MINT_BASE_URL" in str(caught.value)
    assert caught.value.code == "UNAVAILABLE"


def test_a_server_that_accepts_and_says_nothing_is_a_timeout() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with (
            mint.ServiceClient(base_url=address, timeout=0.5) as service,
            pytest.raises(mint.APITimeoutError, match=address),
        ):
            service.get_server_capabilities()


def test_a_server_of_another_version_is_named_as_such() -> None:
    server = grpc.server(ThreadPoolExecutor())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            mint.ServiceClient(base_url=f"127.0.0.1:{port}") as service,
            pytest.raises(mint.InternalServerError, match="another version") as caught,
        ):
            service.get_server_capabilities()
    finally:
        server.stop(0).wait(LIMIT_S)

    assert caught.value.status_code == 501
    assert caught.value.code == "UNIMPLEMENTED"


def test_the_key_and_headers_go_with_every_call(server: Server) -> None:
    headers = {"X-Team": "blue"}
    with mint.ServiceClient(
        base_url=server.address, api_key="sk-1", default_headers=headers
    ) as client:
        client.get_server_capabilities()

    sent = server.model.metadata[-1]
    assert sent["authorization"] == "Bearer sk-1"
    assert sent["x-team"] == "blue"


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    with pytest.raises(mint.BadRequestError) as caught:
        mint.ServiceClient(api_key="geheim\u00df")

    assert "geheim" not in str(caught.value)


def test_headers_that_are_not_legal_are_named(server: Server) -> None:
    with (
        mint.ServiceClient(base_url=server.address, default_headers={"a b": "c"}) as client,
        pytest.raises(mint.MintError, match="metadata"),
    ):
        client.get_server_capabilities()


def test_a_server_that_still_loads_its_model_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint._transport.servers._LOADING_RETRY_S", 0.01)
    with mint.ServiceClient(base_url=server.address) as service:
        server.model.loading = 3
        assert service.create_sampling_client().get_base_model() == "base"

    with mint.ServiceClient(base_url=server.address, timeout=0.1) as service:
        server.model.loading = 10**6
        with pytest.raises(mint.NotFoundError, match="no model yet"):
            service.create_sampling_client()


def test_silence_is_reported_once_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mint._transport.connection._WARN_AFTER_S", 0.0)
    with running() as server, mint.ServiceClient(base_url=server.address) as service:
        training = service.create_lora_training_client()
        fault = Fault(Code.UNAVAILABLE)
        server.script.faults = {(1, 1): fault, (1, 2): fault, (1, 3): fault}
        with caplog.at_level(logging.WARNING, logger="mint"):
            training.discard_gradient().result(LIMIT_S)

    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"no answer from {server.address}")
    assert last == f"{server.address} answers again"


def test_a_sample_is_sent_again_with_the_same_seed(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.fail_first = Fault(Code.UNAVAILABLE)

    response = sampling.sample(mint.ModelInput.from_ints([1])).result(LIMIT_S)

    first, second = server.sampler.requests
    assert first == second
    assert response.seed == first.sampling_params.seed


def test_a_sample_that_a_full_server_refuses_comes_again_when_it_was_told_to(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.fail_first = Fault(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.4)

    response = sampling.sample(mint.ModelInput.from_ints([1])).result(LIMIT_S)

    first, second = server.sampler.requests
    assert first == second
    assert response.seed == first.sampling_params.seed
    assert server.sampler.arrived_s[1] - server.sampler.arrived_s[0] > 0.35


def test_a_sample_cancelled_while_it_waits_to_come_again_is_not_sent(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.fail_first = Fault(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.5)
    prompt = mint.ModelInput.from_ints([1])
    refused = sampling.sample(prompt)
    assert server.sampler.refused.wait(LIMIT_S)

    assert refused.cancel()
    later = threading.Event()
    timer.call_later(1.0, later.set)
    assert later.wait(LIMIT_S)
    assert len(server.sampler.requests) == 1


def test_a_sample_that_waited_for_too_long_is_an_error(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.fail_first = Fault(Code.RESOURCE_EXHAUSTED, "WAITED_TOO_LONG")

    with pytest.raises(mint.RateLimitError) as caught:
        sampling.sample(mint.ModelInput.from_ints([1])).result(LIMIT_S)

    assert caught.value.reason == "WAITED_TOO_LONG"
    assert len(server.sampler.requests) == 1


def test_a_sampling_client_is_pinned_to_the_revision_of_its_creation(
    server: Server, service: mint.ServiceClient
) -> None:
    path = "mint://run/sampler_weights/policy"
    sampling = service.create_sampling_client(model_path=path)
    sampling.sample(mint.ModelInput.from_ints([1])).result(LIMIT_S)

    assert sampling.model_path == f"{path}@7"
    assert server.sampler.requests[-1].model_path == f"{path}@7"


@pytest.mark.parametrize(
    ("told", "variable", "target"),
    [
        ("", "", "127.0.0.1:50052"),
        ("10.0.0.2:1234", "", "10.0.0.2:1234"),
        ("10.0.0.2:1234", "http://10.0.0.3", "10.0.0.3:50052"),
    ],
)
def test_the_sampler_is_where_the_environment_or_else_the_trainer_says(
    server: Server, told: str, variable: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.model.role = model_pb2.SERVICE_ROLE_TRAINER
    server.model.sampler_address = told
    monkeypatch.setenv("MINT_SAMPLER_URL", variable)

    with mint.ServiceClient(base_url=server.address) as service:
        assert service._servers.sampler().address.target == target


def test_a_base_model_that_is_not_served_is_not_found(service: mint.ServiceClient) -> None:
    with pytest.raises(mint.NotFoundError, match="serves base"):
        service.create_sampling_client(base_model="other")


def test_retry_config_is_refused(service: mint.ServiceClient) -> None:
    with pytest.raises(mint.BadRequestError, match="timeout"):
        service.create_sampling_client(retry_config=object())  # type: ignore[arg-type]
