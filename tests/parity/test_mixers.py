"""Mixers with state against the slow, obvious form: one row after the other, in float64."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_core.lora.targets import group
from mint_core.model.base import LoadedBase
from mint_core.model.mixers import delta_rule as chunked
from mint_core.model.mixers.convolution import convolved
from mint_core.model.mixers.delta_rule import delta_step, recalled
from mint_core.model.mixers.kinds import documents_are_alike
from mint_core.model.mixers.mixer import Inputs, Mixer, Recomputed, no_states
from mint_core.model.mixers.runs import Runs
from tests.families import named
from tests.families.hybrids import BY_DEFAULT, HYBRIDS
from tests.family import Family, params
from tests.models import load_base

CPU = torch.device("cpu")
HEADS, KEYS, VALUES = 3, 8, 6
LENGTHS = (1, 31, 200, 32, 33, 64, 3, 65, 128)
MODELS = [family for family in HYBRIDS if not family.reads_more_than_text]
QWEN = named("Qwen 3.5 of text")
# The linear layers of layers with states, all of which LoRA trains.
LINEARS = (
    {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
    {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    {"in_proj", "out_proj"},
)


def obvious(
    inputs: Sequence[Tensor], state: Tensor, *, corrects: bool = True
) -> tuple[Tensor, Tensor]:
    """Queries, keys, values, g and beta, [rows, h, ...] of one sequence; state [h, k, v]."""
    q, k, v, g, beta = inputs
    outputs = []
    for row in range(len(q)):
        state = state * g[row].exp()[:, None, None]
        wrong = v[row] - (state * k[row][:, :, None]).sum(1) if corrects else v[row]
        state = state + k[row][:, :, None] * (wrong * beta[row][:, None])[:, None]
        outputs.append((state * q[row][:, :, None]).sum(1))
    return torch.stack(outputs), state


def sequences(seed: int, rows: int) -> list[Tensor]:
    """Queries, keys, values, g and beta of a stream, float64. Some keys repeat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(rows, HEADS, *sizes, generator=generator, dtype=torch.float64)

    keys = torch.nn.functional.normalize(draw(KEYS), dim=-1)
    keys[rows // 2 :: 3] = keys[:1]
    return [draw(KEYS), keys, draw(VALUES), -draw().abs() * 0.3, draw().sigmoid()]


def spans_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *itertools.accumulate(lengths)]))


def by_chunks(
    inputs: Sequence[Tensor], runs: Runs, state: Tensor | None = None, *, corrects: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The rule over all runs of a stream, [rows, h, v]; states [runs, h, k, v]."""
    taken = [runs.chunks.take(x) for x in inputs]
    output, after = recalled(taken[:3], *taken[3:], runs, state, corrects=corrects)
    return output.unflatten(1, (HEADS, VALUES)), after


@pytest.mark.parametrize("corrects", [True, False])
def test_chunks_of_many_sequences_give_what_one_row_after_the_other_gives(corrects: bool) -> None:
    spans = spans_of(LENGTHS)
    inputs = sequences(0, spans[-1][1])
    states = torch.randn(len(spans), HEADS, KEYS, VALUES, dtype=torch.float64)
    ours, after = by_chunks(inputs, Runs(spans, spans[-1][1], CPU), states, corrects=corrects)
    assert after is not None
    begun, _ = by_chunks(inputs, Runs(spans, spans[-1][1], CPU), corrects=corrects)
    for (start, stop), state, end in zip(spans, states, after, strict=True):
        own = [x[start:stop] for x in inputs]
        expected, last = obvious(own, state, corrects=corrects)
        torch.testing.assert_close(ours[start:stop], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)
        expected, _ = obvious(own, torch.zeros_like(state), corrects=corrects)
        torch.testing.assert_close(begun[start:stop], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("corrects", [True, False])
def test_gradients_through_chunks_are_those_of_one_row_after_the_other(corrects: bool) -> None:
    spans = spans_of(LENGTHS)
    inputs = [x.requires_grad_() for x in sequences(1, spans[-1][1])]
    upstream = torch.randn(spans[-1][1], HEADS, VALUES, dtype=torch.float64)
    ours, _ = by_chunks(inputs, Runs(spans, spans[-1][1], CPU), corrects=corrects)
    found = torch.autograd.grad(ours, inputs, upstream)
    zeros = torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64)
    parts = [[x[start:stop] for x in inputs] for start, stop in spans]
    whole = torch.cat([obvious(part, zeros, corrects=corrects)[0] for part in parts])
    for a, b in zip(found, torch.autograd.grad(whole, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_step_is_one_row() -> None:
    inputs = sequences(2, 5)
    states = torch.randn(5, HEADS, KEYS, VALUES, dtype=torch.float64)
    q, k, v, g, beta = inputs
    after = states.clone()
    ours = delta_step(q, k, v, g.exp(), beta, after)
    for row in range(5):
        own = [x[row : row + 1] for x in inputs]
        expected, last = obvious(own, states[row])
        torch.testing.assert_close(ours[row], expected[0])
        torch.testing.assert_close(after[row], last)


def test_convolutions_see_their_own_run_alone_and_what_came_before_it() -> None:
    spans = [(2, 3), (3, 5), (7, 20), (20, 23)]  # rows between are nobody's
    taps = torch.randn(4, 5, dtype=torch.float64)
    x = torch.randn(24, 5, dtype=torch.float64)
    before = torch.randn(len(spans), 3, 5, dtype=torch.float64)
    y, after = convolved(x, taps, Runs(spans, 24, CPU), before)
    assert after is not None
    for run, (start, stop) in enumerate(spans):
        own = torch.cat([before[run], x[start:stop]])
        expected = sum(taps[j] * own[j : j + stop - start] for j in range(4))
        torch.testing.assert_close(y[start:stop], expected)
        torch.testing.assert_close(after[run], own[-3:])


def test_gradients_of_a_convolution_are_exact() -> None:
    taps = torch.randn(4, 3, dtype=torch.float64)
    runs = Runs(spans_of((1, 2, 9, 3)), 15, CPU)
    x = torch.randn(15, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: convolved(x, taps, runs, None)[0], [x])


@pytest.fixture(scope="module", params=params(MODELS, BY_DEFAULT))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    family: Family = request.param
    return load_base(family.make(tmp_path_factory.mktemp("model")), device="cpu", threads=1)


def drawn(mixer: Mixer, rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, width, generator=generator) for width in mixer.input_widths)


def test_the_layers_with_state_are_ours(base: LoadedBase) -> None:
    assert set(base.mixers) == {0, 2}
    projections = [name for name in base.shapes if group(name) == "attn" and ".1." not in name]
    for layer in ("0", "2"):
        own = {n.rpartition(".")[2] for n in projections if n.split(".")[2] == layer}
        assert own in LINEARS
    assert base.description.bitwise_reproducible


def test_a_document_has_the_same_bits_beside_others_forward_and_backward(base: LoadedBase) -> None:
    mixer = base.mixers[0]
    assert documents_are_alike(base.mixers.values())
    for order in (LENGTHS, LENGTHS[::-1], (700, *LENGTHS, 5)):
        spans = spans_of(order)
        inputs = tuple(x.requires_grad_() for x in drawn(mixer, spans[-1][1]))
        whole = Recomputed.apply(mixer, Runs(spans, spans[-1][1], CPU), *inputs)
        upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(4))
        gradients = torch.autograd.grad(whole, inputs, upstream)
        for start, stop in spans:
            own = tuple(x[start:stop].detach().requires_grad_() for x in inputs)
            alone = Recomputed.apply(mixer, Runs([(0, stop - start)], stop - start, CPU), *own)
            assert torch.equal(alone, whole[start:stop])
            found = torch.autograd.grad(alone, own, upstream[start:stop])
            for a, b in zip(found, gradients, strict=True):
                assert torch.equal(a, b[start:stop])


@torch.no_grad()
def test_pieces_and_single_rows_continue_what_came_before(base: LoadedBase) -> None:
    for mixer in base.mixers.values():
        inputs = drawn(mixer, 300)
        whole, _ = mixer.whole(inputs, Runs([(0, 300)], 300, CPU), None)
        states, outputs = no_states(mixer, 1, CPU), []
        for start, stop in spans_of((130, 2, 64, 1, 1, 70, 1, 31)):
            own = tuple(x[start:stop] for x in inputs)
            if stop - start == 1:
                output, states = mixer.step(own, states)
            else:
                runs = Runs([(0, stop - start)], stop - start, CPU)
                output, states = mixer.whole(own, runs, states)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-4, atol=1e-5)


def test_a_leak_between_documents_is_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Runs.__init__

    def leaking(self: Runs, spans: Sequence[tuple[int, int]], rows: int, device: object) -> None:
        own(self, [(spans[0][0], spans[-1][1])], rows, CPU)

    monkeypatch.setattr(Runs, "__init__", leaking)
    with pytest.raises(FailedPrecondition, match=r"Qwen3_5ForCausalLM .* packed logits differ"):
        load_base(QWEN.make(tmp_path), device="cpu")


def test_a_state_that_is_not_handed_on_is_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = chunked.delta_step

    def forgetting(*inputs: Tensor) -> Tensor:
        return own(*inputs[:-1], torch.zeros_like(inputs[-1]))

    monkeypatch.setattr("mint_core.model.mixers.gated_delta_net.delta_step", forgetting)
    with pytest.raises(FailedPrecondition, match=r"Qwen3_5ForCausalLM .* decoded logits differ"):
        load_base(QWEN.make(tmp_path), device="cpu")


def test_a_model_without_any_attention_is_refused_by_name(tmp_path: Path) -> None:
    folder = QWEN.make(tmp_path, layer_types=["linear_attention"] * 3)
    with pytest.raises(FailedPrecondition, match="none of its layers has attention"):
        load_base(folder, device="cpu")
