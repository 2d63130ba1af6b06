"""Losses that users write, computed here: logprobs from the server, their derivatives back to it.

The gradient of a loss with respect to the weights is the sum over targets of (its derivative with
respect to the target's logprob) times (the gradient of that logprob). Cross-entropy whose weights
are minus those derivatives has just that gradient.
"""

import contextvars
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint import types
from mint._run.passes import Passes, PassRequest, checked_batch, join
from mint._run.run_calls import RunCalls
from mint.errors import APIResponseValidationError, InvalidInputError, refused
from mint.futures import APIFuture, on_thread
from mintrpc.v1 import trainer_pb2, types_pb2

# Of data and a torch.Tensor of logprobs each, to a scalar torch.Tensor and metrics. Not named, as
# nothing but _torch.py imports torch.
CustomLoss = Callable[[list[types.Datum], list[Any]], tuple[Any, Mapping[str, float]]]
Floats = NDArray[np.float32]
_TARGETS, _WEIGHTS = "target_tokens", "weights"


class CustomPass:
    """One forward_backward_custom: a forward, the loss on a thread of its own, a backward that is
    held meanwhile. However the first two end, it is sent or withdrawn.
    """

    def __init__(
        self, passes: Passes, calls: RunCalls, data: Sequence[types.Datum], loss_fn: CustomLoss
    ) -> None:
        if find_spec("torch") is None:
            raise ImportError("a custom loss is computed by torch: install it beside the client")
        self._passes = passes
        self._calls = calls
        self._data = checked_batch(data)
        if not callable(loss_fn):
            raise refused("loss_fn", f"is {loss_fn!r}; give a function of data and logprobs")
        self._loss_fn = loss_fn
        self._context = contextvars.copy_context()
        # With weights of 0, so that it is known now how many messages there will be.
        surrogates = [_surrogate(datum, index) for index, datum in enumerate(self._data)]
        kind = trainer_pb2.ForwardBackwardRequest
        self._requests = passes.requests(kind, surrogates, "cross_entropy", None, "weighted")
        self.backwards, self.future = passes.calls(self._requests, "custom", self._output)

    def start(self) -> None:
        """Sends the forward. Calls that are queued from now on wait for the backward."""
        requests = [_forward_of(request) for request in self._requests]
        forwards, forward = self._passes.calls(requests, "custom", self._set_scored)
        forward.when_done(lambda _: self._forward_ended(forward))
        for call in self.backwards:
            call.held = True
        self._calls.enqueue([*forwards, *self.backwards])

    def _set_scored(self, outputs: list[types.ForwardBackwardOutput], seconds: float) -> None:
        self._scored, self._forward_s = join(outputs, seconds), seconds

    def _forward_ended(self, forward: APIFuture[None]) -> None:
        try:
            on_thread(partial(self._go_on, forward))
        except BaseException as error:  # there is no thread to be had
            self._give_up(error)

    def _go_on(self, forward: APIFuture[None]) -> None:
        """Computes the loss and sends the backward; blocks while the loss is computed."""
        try:
            forward.result()
            with self._calls.working():
                self._loss, self._metrics, slopes = self._context.run(self._differentiate)
            self._fill_in(slopes)
            self._calls.release(self.backwards)
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self.future.fail(error)
        self._calls.withdraw(self.backwards)

    def _differentiate(self) -> tuple[float, dict[str, float], list[Floats]]:
        from mint._torch import differentiate

        logprobs = [output["logprobs"].to_numpy() for output in self._scored.loss_fn_outputs]
        for datum, array in zip(self._data, logprobs, strict=True):
            if list(array.shape) != datum.loss_fn_inputs[_TARGETS].shape:
                raise APIResponseValidationError(
                    f"the server answered logprobs of shape {list(array.shape)} for targets of "
                    f"shape {datum.loss_fn_inputs[_TARGETS].shape}"
                )
        return differentiate(self._loss_fn, self._data, logprobs)

    def _fill_in(self, slopes: Sequence[Floats]) -> None:
        messages = [datum for request in self._requests for datum in request.data]
        for index, (message, slope) in enumerate(zip(messages, slopes, strict=True)):
            if not np.isfinite(slope).all():
                entry = np.argwhere(~np.isfinite(slope))[0].tolist()
                raise InvalidInputError(
                    f"the derivative of the loss with respect to the logprobs of `data[{index}]` "
                    f"is {slope[tuple(entry)]} at {entry}; nothing of this batch was added to the "
                    "gradient",
                    field="loss_fn",
                )
            message.loss_fn_inputs[_WEIGHTS].values = (-slope).astype("<f4").tobytes()

    def _output(
        self, outputs: list[types.ForwardBackwardOutput], seconds: float
    ) -> types.ForwardBackwardOutput:
        """The answer of both passes, with the loss's own metrics."""
        told = dict(join(outputs, self._forward_s + seconds).metrics)
        told["surrogate_loss:sum"] = told.pop("loss:sum", 0.0)
        told = {"loss:sum": self._loss, **told, **self._metrics}
        return types.ForwardBackwardOutput("custom", self._scored.loss_fn_outputs, told)


def _surrogate(datum: types.Datum, index: int) -> types.Datum:
    """What the server reads of a datum; whatever else it holds is for the loss alone."""
    if _TARGETS not in datum.loss_fn_inputs:
        raise InvalidInputError(
            f"`data[{index}].loss_fn_inputs` lacks `{_TARGETS}`, whose logprobs the loss is given",
            field=f"data[{index}].loss_fn_inputs.{_TARGETS}",
        )
    targets = datum.loss_fn_inputs[_TARGETS]
    weights = np.zeros(targets.shape, np.float32)
    inputs = {_TARGETS: targets, _WEIGHTS: weights}
    return types.Datum(datum.model_input, inputs, routed_experts=datum.routed_experts)


def _forward_of(request: PassRequest) -> PassRequest:
    return trainer_pb2.ForwardRequest(
        data=request.data,
        cross_entropy=types_pb2.CrossEntropy(),
        logprob_scope=trainer_pb2.LOGPROB_SCOPE_ALL,
    )
