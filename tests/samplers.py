"""A running sampler as a caller of the contract meets it, with adapters to publish to its store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from checkpoint_store import SAMPLER_WEIGHTS, CheckpointStore
from mint_core.lora.groups import LinearShape
from mint_core.lora.spec import AdapterSpec
from mint_core.lora.targets import initial_arrays
from mintrpc.v1 import model_pb2, model_pb2_grpc, sampler_pb2, sampler_pb2_grpc, types_pb2
from tests.checkpoint_files import publish_checkpoint
from tests.engines_in_process import random_arrays
from tests.servers import RunningService
from tests.warm import children, words_of

DEADLINE_S = 60.0
PROMPT = (40, 41, 42, 43, 44, 45, 46, 47)
HIDDEN, VOCABULARY = 64, 512  # of the tiny model
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Sampler:
    """A running sampler with its store, and the caller's way in."""

    service: RunningService
    store: CheckpointStore
    stub: "sampler_pb2_grpc.SamplerServiceStub"
    model: model_pb2.BaseModel
    metadata: tuple[tuple[str, str], ...] = ()

    def engines(self) -> list[psutil.Process]:
        """Those that live, the oldest first."""
        found = children(self.service.process.pid)
        engines = [each for each in found if "sampler_service.engine" in words_of(each)]
        return sorted(engines, key=lambda each: each.create_time())

    def sample(
        self,
        prompt: tuple[int, ...] = PROMPT,
        *,
        params: dict[str, object] | None = None,
        **fields: object,
    ) -> sampler_pb2.SampleResponse:
        request = sample_request(prompt, params=params, **fields)
        response: sampler_pb2.SampleResponse = self.stub.Sample(
            request, timeout=DEADLINE_S, metadata=self.metadata
        )
        return response

    def logprobs(self, prompt: tuple[int, ...], **fields: object) -> list[float]:
        request = sampler_pb2.ComputeLogprobsRequest(prompt=model_input(prompt), **fields)  # type: ignore[arg-type]
        answer = self.stub.ComputeLogprobs(request, timeout=DEADLINE_S, metadata=self.metadata)
        return list(answer.logprobs)

    def publish(self, run: str, *, seed: int, tenant: str = "default", **changes: object) -> str:
        """Publishes a random adapter on the output head and returns its path with revision."""
        spec = AdapterSpec(rank=4, alpha=32, use_rslora=False, seed=seed, modules=(HEAD,))
        arrays = initial_arrays(spec, {HEAD: LinearShape(HIDDEN, VOCABULARY)})
        fields = {
            "training_run_id": run,
            "kind": SAMPLER_WEIGHTS,
            "name": "a",
            "tenant": tenant,
            "base_model": "tiny",
            "base_fingerprint": self.model.fingerprint,
            "spec": spec,
            "weights": random_arrays(arrays, seed),
            "step": 1,
            **changes,
        }
        manifest = publish_checkpoint(self.store, **fields)  # type: ignore[arg-type]
        return str(manifest.revision_path)


def model_input(tokens: tuple[int, ...]) -> types_pb2.ModelInput:
    chunk = types_pb2.ModelInputChunk(encoded_text=types_pb2.EncodedTextChunk(tokens=tokens))
    return types_pb2.ModelInput(chunks=[chunk])


def sample_request(
    prompt: tuple[int, ...] = PROMPT, *, params: dict[str, object] | None = None, **fields: object
) -> sampler_pb2.SampleRequest:
    chosen = {"max_tokens": 8, "seed": 1, "ignore_eos": True, **(params or {})}
    given = {name: value for name, value in chosen.items() if value is not None}
    return sampler_pb2.SampleRequest(
        prompt=model_input(prompt),
        sampling_params=sampler_pb2.SamplingParams(**given),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def tokens_of(response: sampler_pb2.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, error_details_pb2.ErrorInfo]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        status.details[0].Unpack(info)
    return caught.value.code(), caught.value.details(), info


@contextmanager
def connected(service: RunningService, store: Path, key: str = "") -> Iterator[Sampler]:
    """A caller with a channel of its own."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(service.address, options) as channel:
        capabilities = model_pb2_grpc.ModelServiceStub(channel).GetServerCapabilities(
            model_pb2.GetServerCapabilitiesRequest(), timeout=DEADLINE_S, metadata=metadata
        )
        assert capabilities.role == model_pb2.SERVICE_ROLE_SAMPLER
        assert capabilities.bitwise_reproducible
        stub = sampler_pb2_grpc.SamplerServiceStub(channel)
        model = capabilities.base_models[0]
        yield Sampler(service, CheckpointStore(store), stub, model, metadata)
