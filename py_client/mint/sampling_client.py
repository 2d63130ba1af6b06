"""Samples from one adapter, or from the base model."""

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mint import types
from mint._async_names import awaited, off_loop
from mint._files.tokenizer_files import tokenizer_of
from mint._sampling.handles import handle_of, open_handle
from mint._sampling.sample_stream import SampleStream
from mint._transport.call import Call, check_size
from mint._transport.connection import Connection
from mint._transport.servers import Servers
from mint.errors import APIResponseValidationError, refused
from mint.futures import CancellableFuture, SampleFuture
from mint.types._checks import USE_FROM_INTS, instance, integer, switch, text
from mint.types.samples import optional_logprobs
from mintrpc.v1 import sampler_pb2

F = TypeVar("F", bound=CancellableFuture[Any])
_SEED_BITS = 63


class SamplingClient:
    """A frozen model: one revision of an adapter, whatever is published later, or the base model.
    One of kind "inflight" follows its run instead: each call is of the newest weights.

    Made by `ServiceClient` and `TrainingClient`. Any number of calls may be under way. It can be
    pickled, and used in processes that were forked.
    """

    def __init__(self, servers: Servers, revision_path: str, base_model: str) -> None:
        self._servers = servers
        self._sampler = servers.sampler()
        self._revision_path = revision_path
        self._base_model = base_model

    @property
    def model_path(self) -> str:
        """Path of the adapter, with its revision unless it follows a run; empty: the base model."""
        return self._revision_path

    def sample(
        self,
        prompt: types.ModelInput,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        include_routed_experts: bool = False,
    ) -> SampleFuture:
        """Continuations of `prompt`. Without a seed one is drawn here, so that a call that is sent
        again draws the same tokens; the answer says which.

        All logprobs asked for here are natural logarithms, at temperature 1: of the prompt's
        tokens, of the k likeliest tokens at each place of prompt or continuations, and of
        `target_prompt_logprobs`, int64 `[prompt length - 1, k]`: row i holds token ids that might
        follow tokens 0 to i, -1 for none. `prompt_alt_tokens_k` draws so many tokens, by the seed
        and independently of each other, from what the model would have said in place of each of the
        prompt's but the first. `prompt_logprobs_last_n` scores only so many tokens at the prompt's
        end; what comes before them is then found in the cache if it was computed.
        `include_routed_experts` tells which experts tokens went to, of a base model that has any,
        for `types.Datum` to train with the same.
        """
        request = self._request(prompt, num_samples, sampling_params)
        request.include_prompt_logprobs = switch(include_prompt_logprobs, "include_prompt_logprobs")
        request.topk_prompt_logprobs = integer(topk_prompt_logprobs, "topk_prompt_logprobs")
        request.topk_sample_logprobs = integer(topk_sample_logprobs, "topk_sample_logprobs")
        request.prompt_alt_tokens_k = integer(prompt_alt_tokens_k, "prompt_alt_tokens_k")
        request.prompt_logprobs_last_n = _checked_last_n(prompt_logprobs_last_n)
        request.include_routed_experts = switch(include_routed_experts, "include_routed_experts")
        if target_prompt_logprobs is not None:
            _check_targets(target_prompt_logprobs)
            request.target_prompt_logprobs.CopyFrom(target_prompt_logprobs.to_proto())
        convert = partial(_samples, num_samples)
        return self._submit(self._sampler.sampler.Sample, request, convert, SampleFuture())

    def sample_stream(
        self,
        prompt: types.ModelInput,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
    ) -> SampleStream:
        """Continuations of `prompt`, token by token, the same that `sample` gives for the seed.

        for part in client.sample_stream(prompt, 2, types.SamplingParams(max_tokens=64)):
            print(part.index, tokenizer.decode(part.tokens), part.stop_reason)
        """
        request = self._request(prompt, num_samples, sampling_params)
        check_size(self._sampler, request, "prompt")
        return SampleStream(self._sampler, request)

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> CancellableFuture[list[float | None]]:
        """The logprob of each token of `prompt` given those before it; None for the first, and for
        all but the last `prompt_logprobs_last_n` if that is set.
        """
        instance(prompt, types.ModelInput, "prompt", USE_FROM_INTS)
        request = sampler_pb2.ComputeLogprobsRequest(
            model_path=self._revision_path,
            base_model=self._base_model,
            prompt=prompt.to_proto(),
            prompt_logprobs_last_n=_checked_last_n(prompt_logprobs_last_n),
        )
        future: CancellableFuture[list[float | None]] = CancellableFuture()
        convert = partial(_logprobs, prompt.length)
        return self._submit(self._sampler.sampler.ComputeLogprobs, request, convert, future)

    def get_sampler_handle(self) -> str:
        """Text from which `from_sampler_handle` makes this client again, in any process that
        reaches the sampler. Holds no key.
        """
        return handle_of(self._sampler, self._revision_path, self._base_model)

    @classmethod
    def from_sampler_handle(cls, handle: str, *, api_key: str | None = None) -> "SamplingClient":
        """The client that gave `handle`. The key is `api_key`, else that of the environment."""
        return cls(*open_handle(handle, api_key))

    def __reduce__(self) -> tuple[Callable[[str], "SamplingClient"], tuple[str]]:
        """Pickled as its handle: whoever opens it needs the key in the environment."""
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    def get_base_model(self) -> str:
        """The name of the base model."""
        return self._base_model

    def get_tokenizer(self, *, on_server: bool = False) -> Any:
        """The base model's tokenizer, a Hugging Face one, from the server.

        `on_server`: no files come, and transformers is not needed. It then only has `encode` and
        `decode`, each a call to the server that gives the same tokens, and renderers take it.
        """
        return tokenizer_of(self._servers, self._sampler, self._base_model, on_server=on_server)

    sample_async = awaited(sample)
    compute_logprobs_async = awaited(compute_logprobs)
    get_base_model_async = off_loop(get_base_model)
    get_tokenizer_async = off_loop(get_tokenizer)

    def _request(
        self, prompt: types.ModelInput, num_samples: int, given: types.SamplingParams | None
    ) -> sampler_pb2.SampleRequest:
        given = types.SamplingParams() if given is None else given
        instance(given, types.SamplingParams, "sampling_params", "give types.SamplingParams")
        params = given.to_proto()
        if not params.HasField("seed"):
            params.seed = secrets.randbits(_SEED_BITS)
        instance(prompt, types.ModelInput, "prompt", USE_FROM_INTS)
        return sampler_pb2.SampleRequest(
            model_path=self._revision_path,
            base_model=self._base_model,
            prompt=prompt.to_proto(),
            num_samples=_at_least_1(num_samples, "num_samples"),  # the contract reads 0 as 1
            sampling_params=params,
        )

    def _submit(self, method: Any, request: Any, convert: Callable[[Any], Any], future: F) -> F:
        check_size(self._sampler, request, "prompt")
        call = Call(self._sampler, method, request, convert, future=future, attaches=False)
        call.submit()
        future.when_done(lambda ended: call.cancel() if ended.cancelled() else None)
        return future


def create_sampling_client(
    servers: Servers, model_path: str | None, base_model: str | None
) -> SamplingClient:
    """A client of the newest revision at `model_path`, or without one of the base model."""
    sampler = servers.sampler()
    served = servers.served(sampler, base_model)
    revision_path = ""
    if model_path:
        revision_path = _resolve_revision(sampler, model_path, base_model or "")
    return SamplingClient(servers, revision_path, served.model_name)


def _resolve_revision(sampler: Connection, model_path: str, base_model: str) -> str:
    """The revision that a path names now. Scores one token, so that a path that the sampler cannot
    serve is refused here and not at the first sample."""
    request = sampler_pb2.ComputeLogprobsRequest(
        model_path=text(model_path, "model_path"),
        base_model=base_model,
        prompt=types.ModelInput.from_ints([0]).to_proto(),
    )
    method = sampler.sampler.ComputeLogprobs
    path: str = Call(sampler, method, request, lambda answer: answer.revision_path).ask()
    if not path:
        raise APIResponseValidationError(
            f"the sampler does not say which revision {model_path!r} is"
        )
    return path


def refuse_retry_config(retry_config: object) -> None:
    """Calls are sent again by rules of this client's own."""
    if retry_config is not None:
        raise refused(
            "retry_config",
            "cannot be set: calls are sent again until a server has been silent for "
            "the `timeout` of ServiceClient",
        )


def _checked_last_n(count: int | None) -> int:
    if count is None:
        return 0  # the contract's word for all
    return _at_least_1(count, "prompt_logprobs_last_n", ", or None for all tokens")


def _at_least_1(count: int, field: str, otherwise: str = "") -> int:
    if (whole := integer(count, field)) < 1:
        raise refused(field, f"is {count}; it must be at least 1{otherwise}")
    return whole


def _check_targets(targets: types.TensorData) -> None:
    if not isinstance(targets, types.TensorData) or targets.dtype != "int64":
        kind = targets.dtype if isinstance(targets, types.TensorData) else type(targets).__name__
        raise refused(
            "target_prompt_logprobs",
            f"is {kind}; give a TensorData of int64, [prompt length - 1, k]",
        )


def _samples(num_samples: int, answer: sampler_pb2.SampleResponse) -> types.SampleResponse:
    if len(answer.sequences) != num_samples:
        raise APIResponseValidationError(
            f"the answer has {len(answer.sequences)} sequences instead of {num_samples}"
        )
    return types.SampleResponse.from_proto(answer)


def _logprobs(num_tokens: int, answer: sampler_pb2.ComputeLogprobsResponse) -> list[float | None]:
    if len(answer.logprobs) != num_tokens:
        raise APIResponseValidationError(
            f"the answer has {len(answer.logprobs)} logprobs for {num_tokens} tokens"
        )
    return optional_logprobs(answer.logprobs)
