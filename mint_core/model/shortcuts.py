"""Direct forms of modules that transformers computes in more steps: the same numbers from fewer
operations and calls, forward and backward.

A module is given one only if the form gives what the module's own code does, on inputs of a probe
and on much larger and smaller ones; all others stay as they are.

T: rows of the stream. h: heads. s: head size.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.lora import kernels
from mint_core.lora.groups import ModuleCall
from mint_core.lora.layers import LinearGroup, MultiLoraLinear
from mint_core.model.attention import AttentionBatch
from mint_core.model.attention_kernels import Scores
from mint_core.model.fused import functions

logger = logging.getLogger(__name__)

Form = Callable[..., Any]
# Of the largest value. Shorter types round between steps, which a direct form does not repeat.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-6}
_KINDS = {"SiLUActivation": 0, "SiLU": 0, "PytorchGELUTanh": 1, "GELUTanh": 1}  # see mlp_kernels
FACTORS = (1.0, 100.0, 0.001)  # on inputs: a large one shows a clamp, a small one an epsilon


class RmsNorm:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self.row_wise = False  # whether torch, which may look at the number of rows, is not asked

    def __call__(self, x: Tensor) -> Tensor:
        if self.row_wise:
            return functions.NormedSum.apply(x, None, self.weight, self.eps)[1]  # type: ignore[no-untyped-call,no-any-return]
        if x.dtype != torch.float32:
            return self._short(x)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _RmsNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return _normed(x, _scales(x, self.eps), self.weight)

    def _short(self, x: Tensor) -> Tensor:
        """By torch's own kernel, which computes in float32 and rounds at the end."""
        if self.weight.dim() > 1:  # of heads
            return functional.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def _scales(x: Tensor, eps: float) -> Tensor:  # [..., 1]
    return (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()


def _normed(x: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    return (x * scales).mul_(weight)


class _RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scales = _scales(x, eps)
        ctx.save_for_backward(x, scales)
        ctx.weight = weight
        return _normed(x, scales, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scales = ctx.saved_tensors
        dy = gradients[0] * ctx.weight
        # d scale / d x = - scale^3 x / width
        along = (dy * x).sum(-1, keepdim=True).mul_(scales.pow(3)).div_(x.shape[-1])
        return dy.mul_(scales).sub_(x * along), None, None


def normed_sum(norm: "Form", x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, or x + added, and its norm."""
    if isinstance(norm, RmsNorm) and norm.weight.dim() == 1 and kernels.run_on(x.device):
        total, normed = functions.NormedSum.apply(x, added, norm.weight, norm.eps)  # type: ignore[no-untyped-call]
    else:
        total = x if added is None else x + added
        normed = norm(total)
    return total, normed


class Mlp:
    """down(act(gate x) * up x)."""

    def __init__(self, module: Any) -> None:
        self._group = _group_of(module, "gate_proj", "up_proj")
        self._activation = module.act_fn
        self._kind = _KINDS.get(type(module.act_fn).__name__)
        self._down = _group_of(module, "down_proj")
        self._wide = self._group.cut((2,))

    def __call__(self, x: Tensor) -> Tensor:
        if self._kind is not None and kernels.run_on(x.device):
            (wide,) = self._group.outputs(x, self._wide)
            product = functions.Gated.apply(wide, self._kind)  # type: ignore[no-untyped-call]
        else:
            gate, up = self._group.outputs(x)
            product = self._activation(gate) * up
        return self._down.outputs(product)[0].view_as(x)


def rotated(heads: Tensor, turn: tuple[Tensor, Tensor], norm: RmsNorm | None) -> Tensor:
    """Heads [T, h, s], normed first, turned by rotary embeddings."""
    if norm is not None:
        heads = norm(heads)
    if torch.is_grad_enabled() and heads.requires_grad:
        result: Tensor = _RotationFunction.apply(heads, *turn)  # type: ignore[no-untyped-call]
        return result
    return _turned(heads, *turn)


@lru_cache(maxsize=2)  # all layers of a pass share it; some models have two kinds of layers
def turn(cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Both [1, T, s] -> [T, 1, s], the sines of the first half negative."""
    half = cosines.shape[-1] // 2
    signed = torch.cat([-sines[0, :, :half], sines[0, :, half:]], dim=-1)
    return cosines[0, :, None], signed[:, None]


class _RotationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(heads, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradients[0], *ctx.saved_tensors, back=True), None, None


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor, *, back: bool = False) -> Tensor:
    """Heads; or, from a gradient, that of what was turned."""
    swapped = _swapped(heads * sines) if back else _swapped(heads).mul_(sines)
    return (heads * cosines).add_(swapped)


def _swapped(heads: Tensor) -> Tensor:
    """The halves of each head exchanged."""
    return heads.roll(heads.shape[-1] // 2, -1)


class Attention:
    """Projections, norms of heads where there are any, rotary embeddings, attention, o_proj."""

    def __init__(self, module: Any, scores: Scores, norms: tuple[RmsNorm, ...]) -> None:
        self._group = _group_of(module, "q_proj", "k_proj", "v_proj")
        self._out = _group_of(module, "o_proj")
        self._cut = self._group.cut((2, 1))  # what is turned, and values
        self._whole = self._group.cut((3,))
        self._head_size: int = module.head_dim
        widths = self._group.group.out_features
        self._counts = [width // module.head_dim for width in widths]
        self._heads = self._counts[:2]
        self._norm = _of_heads(norms, self._heads) if norms else None
        self._layer_index: int = module.layer_idx
        self._scores = scores

    def __call__(
        self,
        hidden_states: Tensor,  # [1, T, d]
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_batch: AttentionBatch,
        **_: Any,  # what attention functions are handed besides, such as position ids
    ) -> tuple[Tensor, None]:
        turns = turn(*position_embeddings)
        if kernels.run_on(hidden_states.device):
            output = self._in_kernels(hidden_states, turns, attention_batch)
        else:
            output = attention_batch.attend(
                self._layer_index, *self._projected(hidden_states, turns), self._scores
            ).transpose(0, 1)
        return self._out.outputs(output.flatten(1))[0][None], None

    def _in_kernels(
        self, x: Tensor, turns: tuple[Tensor, Tensor], attention_batch: AttentionBatch
    ) -> Tensor:  # [T, h, s]
        (wide,) = self._group.outputs(x, self._whole)
        norm = None if self._norm is None else (self._norm.weight, self._norm.eps)
        heads = wide.view(wide.shape[0], -1, self._head_size)
        attend_whole = getattr(attention_batch, "attend_whole", None)  # of decoding
        if attend_whole is not None:
            whole: Tensor = attend_whole(self._layer_index, heads, turns, norm, self._scores)
            return whole
        projected: tuple[Tensor, Tensor, Tensor] = functions.Heads.apply(
            heads, *turns, norm, self._counts
        )  # type: ignore[no-untyped-call]
        return attention_batch.attend(self._layer_index, *projected, self._scores).transpose(0, 1)

    def _projected(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [heads, T, s]."""
        parts = self._group.outputs(x, self._cut)
        heads, values = (part.view(part.shape[0], -1, self._head_size) for part in parts)
        heads = rotated(heads, turns, self._norm).transpose(0, 1)
        queries, keys = heads.split_with_sizes(self._heads)
        return queries, keys, values.transpose(0, 1)


def _of_heads(norms: tuple[RmsNorm, ...], heads: Sequence[int]) -> RmsNorm:
    """One norm of queries and keys side by side."""
    weights = [norm.weight.expand(count, -1) for norm, count in zip(norms, heads, strict=True)]
    return RmsNorm(torch.cat(weights), norms[0].eps)


class Layer:
    """Attention and MLP, each over a normed stream and added to it; normed again before it is added
    in models that have norms for that.
    """

    def __init__(self, module: Any, forms: Mapping[nn.Module, Form]) -> None:
        def form(name: str) -> Form:
            part = getattr(module, name)
            return forms.get(part, part)

        self._attention, self._mlp = form("self_attn"), form("mlp")
        self._attention_norm = form("input_layernorm")
        self._mlp_norm = form("post_attention_layernorm")
        self._after_attention = self._after_mlp = _unchanged
        if hasattr(module, "pre_feedforward_layernorm"):
            self._after_attention = self._mlp_norm
            self._mlp_norm = form("pre_feedforward_layernorm")
            self._after_mlp = form("post_feedforward_layernorm")

    @property
    def is_whole(self) -> bool:
        """Whether all parts are direct forms too."""
        return not any(isinstance(part, nn.Module) for part in vars(self).values())

    def __call__(self, hidden_states: Tensor, **options: Any) -> Tensor:  # [1, T, d]
        hidden, normed = normed_sum(self._attention_norm, hidden_states)
        attended, _ = self._attention(hidden_states=normed, **options)
        middle, normed = normed_sum(self._mlp_norm, hidden, self._after_attention(attended))
        return middle + self._after_mlp(self._mlp(normed))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _group_of(module: Any, *names: str) -> LinearGroup:
    """The group of exactly these layers. Raises AttributeError if there is none."""
    layers = [getattr(module, name) for name in names]
    if not all(isinstance(layer, MultiLoraLinear) for layer in layers):
        raise AttributeError("not linear")
    group: LinearGroup = layers[0].together
    if group.group.modules != tuple(layer.name for layer in layers):
        raise AttributeError("not computed together")
    return group


@torch.no_grad()
def install_shortcuts(calls: Sequence[ModuleCall], scores: Mapping[int, Scores]) -> None:
    """Gives modules their direct form, the inner ones first. `calls`: of a pass whose segments are
    still applied; `scores`: of each layer's attention.
    """
    forms: dict[nn.Module, Form] = {}
    for call in calls:
        for form in _forms(call, scores, forms):
            if all(_equal(call, form, factor) for factor in FACTORS):
                forms[call.module] = call.module.forward = form
                break
    logger.info("%d modules are computed in a direct form", len(forms))


def _forms(
    call: ModuleCall, scores: Mapping[int, Scores], forms: Mapping[nn.Module, Form]
) -> Iterator[Form]:
    """Those that a module may have, by the names of its parts."""
    module: Any = call.module
    try:
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if eps is not None and not list(module.children()):
            weight = getattr(module, "weight", None)
            if weight is None:
                weight = torch.ones_like(call.output.flatten(0, -2)[0])
            yield RmsNorm(weight.detach(), eps)
            if weight.dtype == torch.float32:
                yield RmsNorm(1.0 + weight.detach(), eps)  # Gemma's
        elif hasattr(module, "gate_proj"):
            yield Mlp(module)
        elif hasattr(module, "q_proj"):
            parts = [
                getattr(module, name) for name in ("q_norm", "k_norm") if hasattr(module, name)
            ]
            norms = tuple(form for part in parts if isinstance(form := forms[part], RmsNorm))
            yield Attention(module, scores[module.layer_idx], norms)
        elif hasattr(module, "self_attn"):
            yield Layer(module, forms)
    except (AttributeError, KeyError, RuntimeError):  # norms over other widths than heads
        return


def _equal(call: ModuleCall, form: Form, factor: float) -> bool:
    """Whether a form gives what the module's own code does."""
    arguments = tuple(_scaled(a, factor) for a in call.arguments)
    options = call.options
    if "hidden_states" in options:
        options = {**options, "hidden_states": _scaled(options["hidden_states"], factor)}
    try:
        ours, expected = form(*arguments, **options), call.module.forward(*arguments, **options)
    except (TypeError, ValueError, RuntimeError):
        return False
    if isinstance(expected, tuple) and isinstance(ours, tuple):
        ours, expected = ours[0], expected[0]
    if not (isinstance(expected, Tensor) and isinstance(ours, Tensor)):
        return False
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    limit = TOLERANCE[expected.dtype] * expected.abs().max()
    return bool((ours - expected).abs().max() <= limit)


def _scaled(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, Tensor) else value
