"""What a pass keeps in memory, computed from the model, and how long passes and documents may be.

Autograd's own record is asked: a few tokens are run with an adapter on every linear layer, and what
is saved for backward is added up. It is linear in the tokens (tests/parity/test_memory.py).
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_core.lora.layers import Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.lora.targets import HEAD
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import BLOCK_BYTES, MOST_BLOCK_QUERIES, Scores
from mint_core.model.base import LoadedBase
from mint_core.model.base_files import free_bytes
from mint_core.model.experts import CHUNK_BYTES

PROBE_TOKENS = 16
PROBE_RANK = 8
# Of what is free after loading. The rest is for rows and, on a CPU, for a sampler on the same host.
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.6}
# A pass is what a small request of another run waits for at most, and a CPU's matrix products are
# at full speed long before an accelerator's.
MOST_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMemory:
    """Bytes that a pass with backward takes beyond weights and rows."""

    saved_bytes: int  # per token: what all layers keep for backward
    layer_bytes: int  # per token: one layer's share of it
    input_bytes: int  # per token: a layer's input
    logits_bytes: int  # per token, float32
    chunk_rows: int  # whose logits are held at once
    score_bytes: int  # per pair of a query and a key, where scores are not left to a fused kernel
    layers: int  # that can be recomputed
    expert_bytes: int = 0  # per token: inputs and outputs of its experts
    mixer_bytes: int = 0  # per token, while a layer with state is computed backward

    def pass_bytes(self, tokens: int) -> int:
        """Everything kept; one layer's gradients beside it, or the head's."""
        return tokens * self.saved_bytes + self._beside(tokens)

    def recomputed_pass_bytes(self, tokens: int) -> int:
        """The inputs of all layers, and one layer whole."""
        if not self.layers:
            return self.pass_bytes(tokens)
        kept = self.layers * self.input_bytes + self.layer_bytes
        return tokens * kept + self._beside(tokens)

    def _beside(self, tokens: int) -> int:
        head = 2 * min(tokens, self.chunk_rows) * self.logits_bytes
        block = min(BLOCK_BYTES, min(tokens, MOST_BLOCK_QUERIES) * tokens * self.score_bytes)
        experts = min(tokens * self.expert_bytes, 2 * CHUNK_BYTES)
        layer = tokens * max(self.layer_bytes, self.mixer_bytes) + 4 * block + experts
        return 3 * tokens * self.input_bytes + max(head, layer)


def measure(base: LoadedBase, max_lora_rank: int) -> ActivationMemory:
    """Measures a pass in which every linear layer has an adapter of the largest rank."""
    tokens = _probe_tokens(base)
    probe = _Probe(tokens)
    saved = _saved_bytes(base, probe, tokens) // tokens
    body = sum(name != HEAD for name in base.shapes)
    saved += body * (max_lora_rank - PROBE_RANK) * base.dtype.itemsize
    head = base.shapes[HEAD]
    layers = base.recomputation.layers
    input_bytes = head.in_features * base.dtype.itemsize
    routed = base.description.routed
    return ActivationMemory(
        saved_bytes=saved,
        layer_bytes=-(-saved // max(1, layers)),
        input_bytes=input_bytes,
        logits_bytes=head.out_features * 4,
        chunk_rows=base.head.chunk_rows,
        score_bytes=probe.softcapped_heads * 4,
        layers=layers,
        expert_bytes=2 * routed.per_token * input_bytes if routed else 0,
        mixer_bytes=max((m.working_bytes for m in base.mixers.values()), default=0),
    )


def _probe_tokens(base: LoadedBase) -> int:
    """So many that the rows which fill up an expert's do not count for much."""
    routed = base.description.routed
    return max(PROBE_TOKENS, 8 * routed.experts // routed.per_token) if routed else PROBE_TOKENS


class _Probe(PackedAttention):
    def __init__(self, tokens: int) -> None:
        super().__init__([0, tokens])
        self.softcapped_heads = 0

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        if scores.softcap is not None:
            self.softcapped_heads = max(self.softcapped_heads, query.shape[0])
        return super().attend(layer_index, query, key, value, scores)


def _saved_bytes(base: LoadedBase, attention: PackedAttention, tokens: int) -> int:
    """Bytes of the distinct storages that autograd keeps of so many tokens, weights not counted."""
    spec = AdapterSpec(
        rank=PROBE_RANK, alpha=1.0, use_rslora=False, seed=0, modules=tuple(sorted(base.shapes))
    )
    row = base.new_bank().add(spec)
    frozen = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*base.model.parameters(), *base.model.buffers())
    }
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    places = torch.arange(tokens, device=base.device)
    segment = Segment(0, tokens, row, accumulate=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ids = places % base.description.vocabulary_size
        hidden = base.hidden(ids, places, (segment,), attention)
        total = sum(saved.values())  # while `hidden` holds them: none has another's address
        del hidden
    return total


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a pass, and a single document, may be."""

    max_batch_tokens: int  # of a pass over many documents, nothing recomputed
    kept_tokens: int  # of a pass, before it must be recomputed
    document_tokens: int  # of one document, layers recomputed


def lengths(memory: ActivationMemory, budget_bytes: int, device: str) -> Lengths:
    """What fits in a budget.

    Rounded down, passes to a power of two and documents to three binary digits: requests are cut
    by the one and refused by the other, and should be alike after a restart that finds a little
    more or less memory free.
    """
    kept = _longest(memory.pass_bytes, budget_bytes)
    whole = _longest(memory.recomputed_pass_bytes, budget_bytes)
    if not whole:
        raise FailedPrecondition(
            f"a pass over one token needs {memory.recomputed_pass_bytes(1) / 2**20:.0f} MiB and "
            f"{budget_bytes / 2**20:.0f} MiB are at hand; free memory, or serve a smaller model"
        )
    batch = min(MOST_BATCH_TOKENS[device], max(1, _round_down(kept, 1)))
    return Lengths(batch, kept, _round_down(whole, 3))


def most_bytes(memory: ActivationMemory, lengths: Lengths, most_tokens: int) -> int:
    """What a pass over up to so many tokens takes at most."""
    kept = min(lengths.kept_tokens, most_tokens)
    return max(memory.pass_bytes(kept), memory.recomputed_pass_bytes(most_tokens))


def budget_bytes(device: torch.device, own_share: float = 0.0) -> int:
    """Memory at hand for the activations of a pass."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    return int(MEMORY_SHARE[device.type] * free_bytes(device, own_share))


def _longest(needed: Callable[[int], int], budget: int) -> int:
    """The most tokens whose bytes fit."""
    return bisect_right(range(1, (1 << 30) + 1), budget, key=needed)


def _round_down(tokens: int, digits: int) -> int:
    """Keeps the first binary digits."""
    shift = max(0, tokens.bit_length() - digits)
    return tokens >> shift << shift
