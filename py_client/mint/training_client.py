"""Trains one adapter."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mint import types
from mint._async_names import off_loop, submitted
from mint._backwards import BackwardCount
from mint._call import ask
from mint._losses import set_loss
from mint._run_calls import MAX_IN_FLIGHT, Opened, RunCalls
from mint._runs import open_run_again
from mint._watch import RunWatch
from mint.errors import APIResponseValidationError, InvalidInputError
from mint.futures import APIFuture
from mint.sampling_client import SamplingClient, refuse_retry_config
from mint.types.params import text, text_map, ttl
from mintrpc.v1 import trainer_pb2

if TYPE_CHECKING:
    from mint._servers import Servers

LogprobScope = Literal["all", "weighted"]
_SCOPES: dict[str, trainer_pb2.LogprobScope] = {
    "all": trainer_pb2.LOGPROB_SCOPE_ALL,
    "weighted": trainer_pb2.LOGPROB_SCOPE_WEIGHTED,
}
_PassRequest = trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest


class TrainingClient:
    """One training run. Its verbs return futures at once; calls take effect in the order written.

    A call that has been made runs, whether or not anybody waits for it. Made by `ServiceClient`.
    """

    def __init__(self, servers: "Servers", opened: Opened) -> None:
        self._servers = servers
        self._trainer = servers.trainer
        self._backwards = BackwardCount(opened.backward_count)
        self._lock = threading.RLock()
        self.training_run = types.TrainingRun.from_proto(opened.training_run)
        self._calls = RunCalls(
            self._trainer,
            opened,
            partial(open_run_again, servers.trainer, self.training_run_id),
            servers.capabilities(servers.trainer).limits.max_calls_in_flight_per_run
            or MAX_IN_FLIGHT,
        )

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
        request = trainer_pb2.ForwardRequest()
        _fill_pass(request, data, loss_fn, loss_fn_config, logprob_scope)
        convert = partial(_pass_output, len(request.data), loss_fn)
        return self._calls.submit(self._trainer.trainer.Forward, request, convert)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        logprob_scope: LogprobScope = "all",
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Logprobs and loss; adds the gradient of the loss, summed over `data`, to the run's.

        One that is refused leaves the sum incomplete: the next `optim_step` is then refused too.
        """
        with self._lock:
            self._backwards.add()
            request = trainer_pb2.ForwardBackwardRequest()
            _fill_pass(request, data, loss_fn, loss_fn_config, logprob_scope)
            convert = partial(_pass_output, len(request.data), loss_fn)
            return self._calls.submit(self._trainer.trainer.ForwardBackward, request, convert)

    def optim_step(
        self, adam_params: types.AdamParams | None = None
    ) -> APIFuture[types.OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which it clears."""
        adam_params = types.AdamParams() if adam_params is None else adam_params
        if not isinstance(adam_params, types.AdamParams):
            raise InvalidInputError(
                f"`adam_params` is a {type(adam_params).__name__}; give types.AdamParams",
                field="adam_params",
            )
        with self._lock:
            request = trainer_pb2.OptimStepRequest(
                adam_params=adam_params.to_proto(), backward_count=self._backwards.take()
            )
            return self._calls.submit(
                self._trainer.trainer.OptimStep, request, types.OptimStepResponse.from_proto
            )

    def discard_gradient(self) -> APIFuture[types.DiscardGradientResponse]:
        """Clears the accumulated gradient."""
        return self._clearing(
            self._trainer.trainer.DiscardGradient,
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
            overwrite=overwrite,
            ttl=ttl(ttl_seconds),
            metadata=text_map(user_metadata, "user_metadata"),
        )
        return self._calls.submit(
            self._trainer.trainer.SaveState, request, types.SaveWeightsResponse.from_proto
        )

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
        return self._calls.submit(
            self._trainer.trainer.SaveWeightsForSampler,
            request,
            types.SaveWeightsForSamplerResponse.from_proto,
        )

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: None = None
    ) -> SamplingClient:
        """Publishes the weights and returns a client that samples from just these."""
        refuse_retry_config(retry_config)
        return self._servers.sampling_client_of(
            self.save_weights_for_sampler(name).result().revision_path
        )

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, retry_config: None = None
    ) -> SamplingClient:
        """As `save_weights_and_get_sampling_client`; the weights are those of this moment."""
        refuse_retry_config(retry_config)
        saved = await self.save_weights_for_sampler(name)
        return await off_loop(type(self._servers).sampling_client_of)(
            self._servers, saved.revision_path
        )

    def create_sampling_client(self, model_path: str, retry_config: None = None) -> SamplingClient:
        """Returns a client of the revision at `model_path` that is now the newest."""
        refuse_retry_config(retry_config)
        return self._servers.create_sampling_client(model_path, None)

    def watch(self) -> RunWatch:
        """What happens to the run, as it happens: its state, its place in the queue, and how each
        call ends, with its metrics. For `for` or `async for`; leave it with `close` or `with`.
        """
        return RunWatch(self._trainer, self.training_run_id)

    def get_info(self) -> types.GetInfoResponse:
        """What this client trains, as the server sees it now."""
        request = trainer_pb2.GetTrainingRunRequest(training_run_id=self.training_run_id)
        run = ask(
            self._trainer,
            self._trainer.trainer.GetTrainingRun,
            request,
            lambda answer: types.TrainingRun.from_proto(answer.training_run),
        )
        return types.GetInfoResponse.from_run(run)

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, a Hugging Face one, from the server."""
        return self._servers.tokenizer(self._trainer, self.training_run.base_model)

    forward_async = submitted(forward)
    forward_backward_async = submitted(forward_backward)
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
        return self._clearing(
            self._trainer.trainer.LoadState, request, types.LoadWeightsResponse.from_proto
        )

    def _clearing(self, method: Any, request: Any, convert: Any) -> APIFuture[Any]:
        with self._lock:
            ended = self._backwards.clear()
            future: APIFuture[Any] = self._calls.submit(method, request, convert)
            future.add_done_callback(ended)
            return future


def _fill_pass(
    request: _PassRequest,
    data: Sequence[types.Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
    logprob_scope: str,
) -> None:
    set_loss(request, loss_fn, loss_fn_config)
    if logprob_scope not in _SCOPES:
        raise InvalidInputError(
            f"`logprob_scope` is {logprob_scope!r}; it must be 'all' or 'weighted'",
            field="logprob_scope",
        )
    request.logprob_scope = _SCOPES[logprob_scope]
    if isinstance(data, types.Datum) or len(data) == 0:
        raise InvalidInputError(
            "`data` is empty or not a list; a batch needs at least one datum", field="data"
        )
    for index, datum in enumerate(data):
        if not isinstance(datum, types.Datum):
            raise InvalidInputError(
                f"`data[{index}]` is a {type(datum).__name__}; give types.Datum",
                field=f"data[{index}]",
            )
        request.data.append(datum.to_proto())


def _pass_output(
    num_data: int,
    loss_fn: str,
    answer: trainer_pb2.ForwardResponse | trainer_pb2.ForwardBackwardResponse,
) -> types.ForwardBackwardOutput:
    if len(answer.outputs) != num_data:
        raise APIResponseValidationError(
            f"the answer has {len(answer.outputs)} outputs for {num_data} data"
        )
    return types.ForwardBackwardOutput.from_proto(answer, loss_fn)
