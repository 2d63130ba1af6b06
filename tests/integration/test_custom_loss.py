"""Losses of the user's own against the built-in ones, over real services."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import mint
from checkpoint_store import CheckpointStore
from mint import types
from tests.services import Services

LIMIT_S = 120.0
TOLERANCE = 1e-5  # of the norm of each tensor's gradient
LENGTHS = (7, 33, 2, 18)
VOCABULARY = 512
# With these the step is minus the gradient, but for rounding: its root is nothing beside eps.
GRADIENT_STEP = types.AdamParams(learning_rate=1e6, betas=(0.0, 0.0), eps=1e6)

Loss = Callable[[list[types.Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BuiltIn:
    """A loss of the server's, and the same written by hand: of one datum."""

    name: str
    by_hand: Callable[[torch.Tensor, Inputs], torch.Tensor]
    config: Mapping[str, float] | None = None
    wide: bool = False


def ratio(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return torch.exp(logprobs - inputs["logprobs"])


def clipped_objective(ratio: torch.Tensor, inputs: Inputs, low: float, high: float) -> torch.Tensor:
    advantages = inputs["advantages"]
    least = torch.minimum(ratio * advantages, ratio.clip(low, high) * advantages)
    return -(inputs["weights"] * least).sum()


def gspo(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    inside = inputs["weights"] != 0
    sequence = torch.exp((logprobs - inputs["logprobs"])[inside].mean()).detach()
    own = torch.exp(logprobs - logprobs.detach())
    return clipped_objective(sequence * own, inputs, 0.2, 5.0)


def dro(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    penalty = 0.025 * (logprobs - inputs["logprobs"]) ** 2
    return -(inputs["weights"] * (logprobs * inputs["advantages"] - penalty)).sum()


def cispo(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    factor = ratio(logprobs, inputs).clip(0.7, 1.5).detach()
    return -(inputs["weights"] * factor * logprobs * inputs["advantages"]).sum()


def cross_entropy(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return -(inputs["weights"] * logprobs).sum()


CLIPS = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5}
BUILT_IN = [
    BuiltIn("cross_entropy", cross_entropy),
    BuiltIn("cross_entropy", cross_entropy, wide=True),
    BuiltIn(
        "importance_sampling",
        lambda lp, i: -(i["weights"] * ratio(lp, i) * i["advantages"]).sum(),
    ),
    BuiltIn("ppo", lambda lp, i: clipped_objective(ratio(lp, i), i, 0.7, 1.5), CLIPS),
    BuiltIn("cispo", cispo, CLIPS),
    BuiltIn("dro", dro, {"beta": 0.05}),
    BuiltIn("gspo", gspo, {"clip_low_threshold": 0.2, "clip_high_threshold": 5.0}),
]


def make_data(loss: BuiltIn, seed: int) -> list[types.Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for n in LENGTHS:
        shape = (n, 3) if loss.wide else (n,)
        weights = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        weights[: n // 3] = 0.0
        inputs: dict[str, Any] = {
            "target_tokens": rng.integers(0, VOCABULARY, shape),
            "weights": weights,
        }
        if loss.name != "cross_entropy":
            inputs["logprobs"] = rng.normal(-6.5, 0.5, n)
            inputs["advantages"] = rng.normal(0.0, 1.0, n)
        tokens = rng.integers(0, VOCABULARY, n).tolist()
        data.append(types.Datum(types.ModelInput.from_ints(tokens), inputs))
    return data


def as_callable(loss: BuiltIn) -> Loss:
    def custom(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        parts = [
            loss.by_hand(lp, {name: t.to_torch() for name, t in datum.loss_fn_inputs.items()})
            for datum, lp in zip(data, logprobs, strict=True)
        ]
        return torch.stack(parts).sum(), {"parts": float(len(parts))}

    return custom


class Trained:
    """A run whose adapter is not zero, and what a batch adds to its gradient."""

    def __init__(self, service: mint.ServiceClient, services: Services) -> None:
        self.client = service.create_lora_training_client(rank=4, seed=5)
        self._store = CheckpointStore(services.store)
        self.client.forward_backward(make_data(BUILT_IN[0], 1)[:2])  # which nobody cuts
        self.client.optim_step(types.AdamParams(learning_rate=1e-2))
        self._before = self._weights()

    def gradient(self) -> dict[str, np.ndarray]:
        self.client.optim_step(GRADIENT_STEP).result(LIMIT_S)
        after = self._weights()
        return {name: self._before[name] - after[name] for name in after}

    def _weights(self) -> dict[str, np.ndarray]:
        path = self.client.save_weights_for_sampler("now").result(LIMIT_S).revision_path
        return self._store.open(path, tenant="default").weights()


def assert_equal(ours: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0
        # What rounding of the weights themselves leaves is not the loss's.
        rounding = 1e-7 * np.sqrt(gradient.size)
        assert np.linalg.norm(ours[name] - gradient) <= TOLERANCE * norm + rounding, name


@pytest.fixture
def cut_service(services: Services) -> Any:
    """A client whose messages take two data at most."""
    with mint.ServiceClient(base_url=services.trainer) as client:
        limits = client.get_server_capabilities().limits  # which it keeps
        object.__setattr__(limits, "max_data_per_request", 2)
        yield client


@pytest.mark.parametrize("loss", BUILT_IN, ids=lambda loss: loss.name + "-wide" * loss.wide)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_built_in_loss_written_as_a_callable_has_the_same_gradient(
    service: mint.ServiceClient,
    cut_service: mint.ServiceClient,
    services: Services,
    loss: BuiltIn,
    cut: bool,
) -> None:
    data = make_data(loss, 7)
    built_in = Trained(service, services)
    custom = Trained(cut_service if cut else service, services)

    wanted = built_in.client.forward_backward(data, loss.name, loss.config).result(LIMIT_S)
    result = custom.client.forward_backward_custom(data, as_callable(loss)).result(LIMIT_S)

    assert result.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=TOLERANCE)
    assert result.metrics["parts"] == len(LENGTHS)
    assert result.loss_fn_outputs == wanted.loss_fn_outputs
    assert_equal(custom.gradient(), built_in.gradient())


@pytest.mark.parametrize("loss", BUILT_IN[:3], ids=lambda loss: loss.name + "-wide" * loss.wide)
def test_a_batch_that_is_cut_is_the_sum_of_its_messages(
    service: mint.ServiceClient,
    cut_service: mint.ServiceClient,
    services: Services,
    loss: BuiltIn,
) -> None:
    """In every bit, and the same as the whole but for the order of sums."""
    data = make_data(loss, 8)
    whole, parts, cut = (Trained(each, services) for each in (service, service, cut_service))

    once = whole.client.forward_backward(data, loss.name).result(LIMIT_S)
    each = [
        parts.client.forward_backward(data[i : i + 2], loss.name).result(LIMIT_S) for i in (0, 2)
    ]
    result = cut.client.forward_backward(data, loss.name).result(LIMIT_S)

    assert result.loss_fn_outputs == each[0].loss_fn_outputs + each[1].loss_fn_outputs
    for name in ("loss:sum", "tokens:sum", "weighted_tokens:sum"):
        assert result.metrics[name] == each[0].metrics[name] + each[1].metrics[name]
    assert result.loss_fn_outputs == once.loss_fn_outputs
    gradient, by_parts = cut.gradient(), parts.gradient()
    assert all(np.array_equal(gradient[name], by_parts[name]) for name in gradient)
    assert_equal(gradient, whole.gradient())


def test_a_loss_may_couple_its_data(service: mint.ServiceClient, services: Services) -> None:
    """As preference losses do: -log sigmoid of a difference of two sequences."""
    data = make_data(BUILT_IN[0], 9)

    def preference(
        data: Sequence[types.Datum], logprobs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        sums = torch.stack([lp.sum() for lp in logprobs])
        margins = (sums[0::2] - sums[1::2]) / 10
        loss = -torch.nn.functional.logsigmoid(margins).sum()
        return loss, {"pair_accuracy": (margins > 0).float().mean().item()}

    run = Trained(service, services)
    first = run.client.forward_backward_custom(data, preference).result(LIMIT_S)
    for _ in range(5):
        run.client.forward_backward_custom(data, preference)
        run.client.optim_step(types.AdamParams(learning_rate=3e-3))
    last = run.client.forward_backward_custom(data, preference).result(LIMIT_S)

    assert last.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert 0 <= first.metrics["pair_accuracy"] <= 1


def test_a_loss_that_raises_costs_its_step_and_no_more(
    service: mint.ServiceClient, services: Services
) -> None:
    def broken(data: list[types.Datum], logprobs: list[torch.Tensor]) -> Any:
        raise ValueError("mine")

    data = make_data(BUILT_IN[0], 10)
    run = Trained(service, services)
    good = run.client.forward_backward(data)
    bad = run.client.forward_backward_custom(data, broken)
    step = run.client.optim_step()

    good.result(LIMIT_S)
    with pytest.raises(ValueError, match="mine"):
        bad.result(LIMIT_S)
    with pytest.raises(mint.BadRequestError) as caught:
        step.result(LIMIT_S)
    assert caught.value.reason == "BACKWARD_COUNT_MISMATCH"
    run.client.forward_backward_custom(data, as_callable(BUILT_IN[0]))
    assert run.client.optim_step().result(LIMIT_S).step == 2
