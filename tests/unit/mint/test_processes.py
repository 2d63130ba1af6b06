"""Clients in several processes: pickled, forked, spawned."""

import base64
import multiprocessing
import pickle
import subprocess
import sys
from typing import Any

import pytest

import mint
from mint import types
from tests.unit.mint.faulty_server import Server

LIMIT_S = 60.0
PROMPT = types.ModelInput.from_ints([1, 2, 3])

# What a script does that hands clients to its workers. argv: address, start method.
WORKERS = """
import multiprocessing, sys
import mint
from mint import types

def sample(client):
    prompt = types.ModelInput.from_ints([1, 2, 3])
    return client.sample(prompt, 2).result(20).sequences[1].tokens

def inherited(queue):
    assert service.get_server_capabilities().supported_models
    assert service.get_training_run(training.training_run_id)
    refusal = rest.delete_checkpoint_from_tinker_path("mint://r/weights/a").exception(20)
    assert refusal.code == "UNIMPLEMENTED", refusal  # an answer of this server's
    queue.put(sample(sampling))

if __name__ == "__main__":
    service = mint.ServiceClient(base_url=sys.argv[1])
    sampling = service.create_sampling_client(model_path="mint://r/sampler_weights/a")
    training = service.create_lora_training_client()
    rest = service.create_rest_client()
    data = [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})]
    before = training.forward_backward(data)
    sample(sampling)
    context = multiprocessing.get_context(sys.argv[2])
    with context.Pool(2) as pool:
        print(pool.map(sample, [sampling] * 4))
    if sys.argv[2] == "fork":
        queue = context.Queue()
        worker = context.Process(target=inherited, args=(queue,))
        worker.start()
        print(queue.get(timeout=20))
        worker.join(20)
    before.result(20)
    training.optim_step().result(20)
    print(sample(sampling))
"""


def run_script(program: str, *arguments: str, file: Any = None) -> str:
    command = [sys.executable, str(file)] if file else [sys.executable, "-c", program]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_sample_with_a_client_they_were_given(
    server: Server, tmp_path: Any, method: str
) -> None:
    script = tmp_path / "script.py"  # spawn imports it again
    script.write_text(WORKERS)

    output = run_script("", server.address, method, file=script).splitlines()

    assert output[0] == str([[1, 2]] * 4)
    assert output[1:] == ["[1, 2]"] * (2 if method == "fork" else 1)
    assert {request.model_path for request in server.sampler.requests} == {
        "mint://r/sampler_weights/a@7"
    }
    methods = [method for _, method in server.script.executed]
    assert methods == ["ForwardBackward", "OptimStep"]


TRAINS_IN_CHILD = """
import os, sys
import mint
from mint import types
training = mint.ServiceClient(base_url=sys.argv[1]).create_lora_training_client()
data = [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})]
training.forward(data).result(20)
if (child := os.fork()) == 0:
    try:
        training.forward(data)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
training.forward(data).result(20)
"""


def test_a_training_client_is_refused_in_a_forked_process(server: Server) -> None:
    assert "open_training_run('run-1')" in run_script(TRAINS_IN_CHILD, server.address)
    assert len(server.script.executed) == 2


LATE = """
import os
import grpc
import mint
service = mint.ServiceClient(base_url="127.0.0.1:1")
if (child := os.fork()) == 0:
    try:
        service.create_lora_training_client()
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_fork_that_grpc_was_not_told_of_is_refused_instead_of_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GRPC_ENABLE_FORK_SUPPORT", raising=False)

    assert "import `mint` first" in run_script(LATE)


def test_a_pickled_client_is_the_same_and_holds_no_key(server: Server) -> None:
    with mint.ServiceClient(
        base_url=server.address,
        api_key="sk-secret",
        timeout=99,
        default_headers={"x-team": "blue", "Authorization": "Bearer other"},
    ) as service:
        client = service.create_sampling_client(model_path="mint://r/sampler_weights/a")
        handle, pickled = client.get_sampler_handle(), pickle.dumps(client)

    assert b"secret" not in base64.urlsafe_b64decode(handle)
    assert b"other" not in base64.urlsafe_b64decode(handle)
    assert handle.encode() in pickled
    again = pickle.loads(pickled)
    assert again.model_path == client.model_path
    assert again.get_base_model() == client.get_base_model()
    assert again.get_sampler_handle() == handle
    assert len(again.sample(PROMPT, 3).result(LIMIT_S).sequences) == 3
    keyed = mint.SamplingClient.from_sampler_handle(handle, api_key="sk-mine")
    assert keyed._sampler.settings.api_key == "sk-mine"


def test_clients_of_one_handle_share_a_connection(sampling: mint.SamplingClient) -> None:
    handle = sampling.get_sampler_handle()
    first, second = (mint.SamplingClient.from_sampler_handle(handle) for _ in range(2))
    other = mint.SamplingClient.from_sampler_handle(handle, api_key="sk-other")

    assert first._sampler is second._sampler
    assert other._sampler is not first._sampler


@pytest.mark.parametrize("handle", ["", "text", base64.urlsafe_b64encode(b'{"a": 1}').decode()])
def test_a_text_that_is_no_handle_is_refused(handle: str) -> None:
    with pytest.raises(mint.InvalidInputError, match="get_sampler_handle"):
        mint.SamplingClient.from_sampler_handle(handle)


def test_a_training_client_cannot_be_pickled_and_says_what_to_do(
    training: mint.TrainingClient,
) -> None:
    with pytest.raises(TypeError, match="takes the run over"):
        pickle.dumps(training)
    assert multiprocessing.active_children() == []
