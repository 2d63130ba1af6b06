"""What the client sends when nothing but defaults is asked for, as a server of the baseline reads
it.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import mint
from mint import types
from mint._transport import connection
from mint_core.rpc.parsing import parse
from tests import baseline
from tests.services import Services

LIMIT_S = 60.0
PROMPT = types.ModelInput.from_ints([5, 6, 7])
DATA = [types.Datum(PROMPT, {"target_tokens": [6, 7, 8], "weights": [0, 1, 1]})]
LOSSES: Any = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
ON_REQUEST = {"Tokenize", "Detokenize", "RenderChat"}  # by `get_tokenizer(on_server=True)`

Sent = dict[str, list[bytes]]  # by the path of the RPC


class Recording:
    """A channel that keeps what goes on the wire."""

    def __init__(self, channel: Any, sent: Sent) -> None:
        self._channel = channel
        self._sent = sent

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._channel, name)
        if not name.startswith(("unary_", "stream_")):
            return made

        def call(path: str, *, request_serializer: Any, **options: Any) -> Any:
            def serialized(request: Message) -> bytes:
                raw: bytes = request_serializer(request)
                self._sent[path].append(raw)
                return raw

            return made(path, request_serializer=serialized, **options)

        return call


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    found: Sent = defaultdict(list)
    channel = connection._channel
    monkeypatch.setattr(connection, "_channel", lambda *where: Recording(channel(*where), found))
    return found


def test_default_requests_have_nothing_that_the_baseline_lacks(
    services: Services, sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no tokenizer is yet
    with mint.ServiceClient(base_url=services.trainer) as service:
        use_everything(service, tmp_path)

    assert {path.rpartition("/")[2] for path in sent} == baseline.client_calls() - ON_REQUEST
    for path, requests in sent.items():
        kind = GetMessageClass(baseline.method(path).input_type)
        for raw in requests:
            assert not list(unknown_values(parse(kind.FromString, raw))), path


def use_everything(service: mint.ServiceClient, folder: Path) -> None:
    """Every call of the client that sends something, with what it must have."""
    rest = service.create_rest_client()
    rest.get_server_capabilities().result(LIMIT_S)
    run = service.create_lora_training_client()
    run_id = run.training_run_id
    run.get_tokenizer()
    with run.watch() as watch:
        next(watch)
    for loss in LOSSES:
        needs = {} if loss == "cross_entropy" else {"logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
        config = {"beta": 0.1} if loss == "dro" else None
        data = [types.Datum(PROMPT, {**DATA[0].loss_fn_inputs, **needs})]
        run.forward(data, loss, loss_fn_config=config).result(LIMIT_S)
    run.forward_backward(DATA).result(LIMIT_S)
    run.optim_step(types.AdamParams()).result(LIMIT_S)
    run.discard_gradient().result(LIMIT_S)
    state = run.save_state("state").result(LIMIT_S).path
    run.load_state(state).result(LIMIT_S)
    run.load_state_with_optimizer(state).result(LIMIT_S)
    service.create_training_client_from_state(state)
    service.create_training_client_from_state_with_optimizer(state)
    sampling = run.save_weights_and_get_sampling_client(name="sampler")
    for client in (sampling, service.create_sampling_client()):
        client.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result(LIMIT_S)
        list(client.sample_stream(PROMPT, 1, types.SamplingParams(max_tokens=2)))
        client.compute_logprobs(PROMPT).result(LIMIT_S)
    service.open_training_run(run_id)
    service.get_training_run(run_id)
    service.list_training_runs()
    service.update_training_run(run_id, {"a": "b"})
    rest.list_training_runs().result(LIMIT_S)
    rest.list_checkpoints(run_id).result(LIMIT_S)
    rest.list_user_checkpoints().result(LIMIT_S)
    path = f"mint://{run_id}/sampler_weights/sampler"
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(LIMIT_S)
    rest.set_checkpoint_metadata(path, {"a": "b"}).result(LIMIT_S)
    rest.copy_checkpoint(path, "copy").result(LIMIT_S)
    rest.export_checkpoint(path).result(LIMIT_S)
    rest.download_checkpoint(path, folder / "down").result(LIMIT_S)
    rest.upload_checkpoint(folder / "down", "up").result(LIMIT_S)
    rest.delete_checkpoint_from_tinker_path(path).result(LIMIT_S)
    service.delete_training_run(run_id)


def unknown_values(message: Message) -> Iterator[str]:
    """Enum values that are numbers to this message's contract."""
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated else [value]
        if field.enum_type is not None:
            known = field.enum_type.values_by_number
            yield from (f"{field.name}={each}" for each in values if each not in known)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in values:
                yield from unknown_values(each)
