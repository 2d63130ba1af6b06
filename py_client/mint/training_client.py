"""Trains one adapter."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

from mint import types
from mint._async_names import off_loop, submitted
from mint._files.tokenizer_files import tokenizer_of
from mint._run.custom_loss import CustomLoss, CustomPass
from mint._run.passes import BackwardCount, LogprobScope, Passes
from mint._run.run_calls import MAX_IN_FLIGHT, RunCalls
from mint._run.runs import Opened, get_run
from mint._run.watch import RunWatch
from mint._transport.servers import Servers
from mint.errors import refused
from mint.futures import APIFuture, on_thread
from mint.sampling_client import SamplingClient, create_sampling_client, refuse_retry_config
from mint.types._checks import instance, switch, text, text_map, ttl
from mintrpc.v1 import trainer_pb2

P = ParamSpec("P")
T = TypeVar("T")
SamplingClientKind = Literal["snapshot", "inflight"]
_INFLIGHT = "inflight"  # the name under which they are published if none is given


def _counting_refusals(
    method: Callable[Concatenate["TrainingClient", P], T],
) -> Callable[Concatenate["TrainingClient", P], T]:
    """Of what is called behind an await: a gather may swallow what it raises."""

    @functools.wraps(method)
    def call(self: "TrainingClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            self._backwards.refused_behind_await(error)
            raise

    return call


class TrainingClient:
    """One training run. Its verbs return futures at once; calls take effect in the order written.

    A call that has been made runs, whether or not anybody waits for it. Made by `ServiceClient`.
    """

    training_run: types.TrainingRun  # as it was opened

    def __init__(self, servers: Servers, opened: Opened) -> None:
        self._servers = servers
        self._trainer = servers.trainer
        self._stub = servers.trainer.trainer
        self._backwards = BackwardCount(opened.backward_count)
        self._lock = threading.RLock()
        self.training_run = types.TrainingRun.from_proto(opened.training_run)
        limits = servers.capabilities(servers.trainer).limits
        self._calls = RunCalls(
            self._trainer,
            opened,
            limits.max_calls_in_flight_per_run or MAX_IN_FLIGHT,
        )
        self._passes = Passes(self._calls, limits.max_data_per_request)

    @property
    def training_run_id(self) -> str:
        """The run's id, with which `ServiceClient.open_training_run` opens it again."""
        return self.training_run.training_run_id

    @property
    def model_id(self) -> str:
        """The same as `training_run_id`."""
        return self.training_run_id

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        logprob_scope: LogprobScope = "all",
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Logprobs and loss, without a gradient."""
        kind = trainer_pb2.ForwardRequest
        requests = self._passes.requests(kind, data, loss_fn, loss_fn_config, logprob_scope)
        return self._passes.submit(requests, loss_fn)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        logprob_scope: LogprobScope = "all",
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Logprobs and loss; adds the gradient of the loss, summed over `data`, to the run's.

        One whose future fails leaves the sum incomplete: the next `optim_step` is then refused too.
        One that raises at once has no effect.
        """
        with self._lock:
            kind = trainer_pb2.ForwardBackwardRequest
            requests = self._passes.requests(kind, data, loss_fn, loss_fn_config, logprob_scope)
            future = self._passes.submit(requests, loss_fn)
            self._backwards.add(len(requests), future)
            return future

    def forward_backward_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLoss,
        *,
        loss_type_input: str | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """As `forward_backward`, with a loss of your own, computed by torch in this process.

        `loss_fn(data, logprobs)` gets the data and, per datum, the logprobs of its `target_tokens`,
        [n] or [n, k], float32, and returns a tensor with one value and metrics by name. It may
        couple data in any way. Of a datum the server reads `target_tokens` alone; whatever else is
        in `loss_fn_inputs` is for the loss. It runs on a thread of its own, and must neither call
        this client nor wait for calls of its that were made after this one.

        Costs a forward and a backward. Calls made after it take effect after it. The metrics of the
        loss are in the answer, beside `loss:sum`, its value. If the loss raises, this call fails
        with that error and the next `optim_step` is refused; the run goes on.
        """
        if loss_type_input not in (None, "logprobs"):
            raise refused("loss_type_input", f"is {loss_type_input!r}; losses are given logprobs")
        with self._lock:
            custom = CustomPass(self._passes, self._calls, data, loss_fn)
            custom.start()
            self._backwards.add(len(custom.backwards), custom.future)
            return custom.future

    def optim_step(
        self, adam_params: types.AdamParams | None = None
    ) -> APIFuture[types.OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which it clears."""
        adam_params = types.AdamParams() if adam_params is None else adam_params
        instance(adam_params, types.AdamParams, "adam_params", "give types.AdamParams")
        with self._lock:
            count, explained = self._backwards.take()
            request = trainer_pb2.OptimStepRequest(
                adam_params=adam_params.to_proto(), backward_count=count
            )
            convert = types.OptimStepResponse.from_proto
            return self._calls.submit(self._stub.OptimStep, request, convert, explained)

    def discard_gradient(self) -> APIFuture[types.DiscardGradientResponse]:
        """Clears the accumulated gradient."""
        return self._clearing(
            self._stub.DiscardGradient,
            trainer_pb2.DiscardGradientRequest(),
            types.DiscardGradientResponse.from_proto,
        )

    def save_state(
        self,
        name: str,
        ttl_seconds: float | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Saves weights, optimizer state and step. A name that exists needs `overwrite`."""
        request = trainer_pb2.SaveStateRequest(
            name=text(name, "name"),
            overwrite=switch(overwrite, "overwrite"),
            ttl=ttl(ttl_seconds),
            metadata=text_map(user_metadata, "user_metadata"),
        )
        read = types.SaveWeightsResponse.from_proto
        return self._calls.submit(self._stub.SaveState, request, read)

    def load_state(self, path: str) -> APIFuture[types.LoadWeightsResponse]:
        """Replaces the weights by a checkpoint's, and starts the optimizer afresh."""
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[types.LoadWeightsResponse]:
        """Replaces weights, optimizer state and step by a checkpoint's."""
        return self._load(path, with_optimizer=True)

    def save_weights_for_sampler(
        self,
        name: str | None = None,
        ttl_seconds: float | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Publishes the weights for sampling; a name may be published again. Without a name: a
        snapshot that is kept for 24 hours after its last use."""
        request = trainer_pb2.SaveWeightsForSamplerRequest(
            name="" if name is None else text(name, "name"),
            ttl=ttl(ttl_seconds),
            metadata=text_map(user_metadata, "user_metadata"),
        )
        read = types.SaveWeightsForSamplerResponse.from_proto
        return self._calls.submit(self._stub.SaveWeightsForSampler, request, read)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: None = None,
        *,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """Publishes the weights and returns a client that samples from just these.

        `kind="inflight"`: the client, and all of this kind and name that were made before, take
        the newest weights that were published so, or by `save_weights_for_sampler` under that name.
        A sample that has begun ends on the weights it began with; each sequence says which.
        """
        saved = self._publish(name, retry_config, kind).result()
        return self._sampling_client(saved, kind)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: None = None,
        *,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClient:
        """As `save_weights_and_get_sampling_client`; the weights are those of this moment."""
        saved = await self._publish(name, retry_config, kind)
        return await on_thread(partial(self._sampling_client, saved, kind))

    def create_sampling_client(self, model_path: str, retry_config: None = None) -> SamplingClient:
        """Returns a client of the revision at `model_path` that is now the newest."""
        refuse_retry_config(retry_config)
        return create_sampling_client(self._servers, model_path, None)

    def watch(self) -> RunWatch:
        """What happens to the run, as it happens: its state, its place in the queue, and how each
        call ends, with its metrics. For `for` or `async for`; leave it with `close` or `with`.
        """
        return RunWatch(self._trainer, self.training_run_id)

    def get_info(self) -> types.GetInfoResponse:
        """What this client trains, as the server sees it now."""
        call = get_run(self._trainer, self.training_run_id)
        return call.then(types.GetInfoResponse.from_run).ask()

    def get_tokenizer(self, *, on_server: bool = False) -> Any:
        """The base model's tokenizer, a Hugging Face one, from the server.

        `on_server`: no files come, and transformers is not needed. It then only has `encode` and
        `decode`, each a call to the server that gives the same tokens, and renderers take it.
        """
        base_model = self.training_run.base_model
        return tokenizer_of(self._servers, self._trainer, base_model, on_server=on_server)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a TrainingClient stays in its process: two would send different calls under the same "
            f"number; elsewhere use ServiceClient.open_training_run({self.training_run_id!r}), "
            "which takes the run over"
        )

    forward_async = submitted(forward)
    forward_backward_async = submitted(_counting_refusals(forward_backward))
    forward_backward_custom_async = submitted(_counting_refusals(forward_backward_custom))
    optim_step_async = submitted(optim_step)
    discard_gradient_async = submitted(discard_gradient)
    save_state_async = submitted(save_state)
    load_state_async = submitted(load_state)
    load_state_with_optimizer_async = submitted(load_state_with_optimizer)
    save_weights_for_sampler_async = submitted(save_weights_for_sampler)
    create_sampling_client_async = off_loop(create_sampling_client)
    get_info_async = off_loop(get_info)
    get_tokenizer_async = off_loop(get_tokenizer)

    def _load(self, path: str, *, with_optimizer: bool) -> APIFuture[types.LoadWeightsResponse]:
        request = trainer_pb2.LoadStateRequest(
            path=text(path, "path"), with_optimizer=with_optimizer
        )
        return self._clearing(self._stub.LoadState, request, types.LoadWeightsResponse.from_proto)

    def _clearing(self, method: Any, request: Any, convert: Any) -> APIFuture[Any]:
        with self._lock:
            ended = self._backwards.clear()
            future: APIFuture[Any] = self._calls.submit(method, request, convert)
            future.when_done(ended)
            return future

    def _publish(
        self, name: str | None, retry_config: None, kind: str
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        refuse_retry_config(retry_config)
        if kind not in ("snapshot", "inflight"):
            raise refused("kind", f"is {kind!r}; it must be 'snapshot' or 'inflight'")
        return self.save_weights_for_sampler(
            _INFLIGHT if name is None and kind == "inflight" else name
        )

    def _sampling_client(
        self, saved: types.SaveWeightsForSamplerResponse, kind: str
    ) -> SamplingClient:
        path = saved.path if kind == "inflight" else saved.revision_path
        served = self._servers.served(self._servers.sampler())
        return SamplingClient(self._servers, path, served.model_name)
