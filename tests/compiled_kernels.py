"""Compiles the Triton kernels for GPUs, down to machine code, on a machine that needs none:

    python -m tests.compiled_kernels

Those beside attention are compiled for both kinds of GPU, in one type each; with --all in every
type. It must run without TRITON_INTERPRET, so in a process of its own.
"""

import itertools
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mint_core.lora.column_kernels import (
    COLUMNS,
    INNER,
    MOST_SPLITS,
    OUTPUTS,
    expand,
    shrink,
)
from mint_core.lora.column_kernels import ROWS as FEW
from mint_core.lora.segment_kernels import COLUMNS as RANKS
from mint_core.lora.segment_kernels import INNER as READ
from mint_core.lora.segment_kernels import add_gradients, expand_own, shrink_own
from mint_core.lora.segment_tables import OUTPUTS as WRITTEN
from mint_core.lora.segment_tables import ROWS
from mint_core.lora.weight_kernels import INNER as SUMMED
from mint_core.lora.weight_kernels import OUTPUTS as MULTIPLIED
from mint_core.lora.weight_kernels import PLACES as ADDED
from mint_core.lora.weight_kernels import PLAIN_ROWS, add_splits, multiply_split, product
from mint_core.lora.weight_kernels import ROWS as MULTIPLIED_ROWS
from mint_core.model.attention_kernels import Scores
from mint_core.model.fused.head_kernels import HEADS, turn, turn_back
from mint_core.model.fused.mlp_kernels import PLACES, SILU, TANH_GELU, gate_back, gate_product
from mint_core.model.fused.norm_kernels import norm_back, norm_sum
from mint_core.model.fused.softmax_kernels import LOWEST, differentiate, sum_powers
from mint_core.model.fused.softmax_kernels import TILE as LOGITS
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.cache.paged_kernels import attend_split, combine_splits, constants
from trainer_service.engine.digest_kernel import TILE, sum_block

# (compute capability, dtype, its name in Triton, head size, heads, key heads, scores)
CASES = (
    (90, torch.bfloat16, "bf16", 128, 16, 8, Scores(0.1)),  # Qwen3
    (90, torch.float32, "fp32", 96, 32, 32, Scores(0.1)),  # Phi-3
    (80, torch.float16, "fp16", 256, 8, 4, Scores(0.1, softcap=50.0)),  # Gemma 2
)
CAPABILITIES, TYPES = (80, 90), ("bf16", "fp16", "fp32")
FEW_KINDS = ((90, "bf16"), (80, "fp32"))
_COLUMNS = {"ROWS": FEW, "COLUMNS": COLUMNS, "WIDEN": False}
_OWN = {"ROWS": ROWS, "COLUMNS": RANKS, "WIDEN": False}
_FLOAT8 = {
    "ROWS": MULTIPLIED_ROWS,
    "OUTPUTS": MULTIPLIED,
    "INNER": SUMMED,
    "WIDEN": False,
}
_NORM = {"ROOM": 4096, "ADDS": True}
_GATE = {"PLACES": PLACES}
_TURN = {"SIZE": 128, "ROOM": 64, "HEADS": HEADS}
OTHERS = (
    (shrink, {**_COLUMNS, "INNER": INNER}),
    (expand, {**_COLUMNS, "OUTPUTS": OUTPUTS, "SPLITS": MOST_SPLITS}),
    (turn, {**_TURN, "NORMED": True, "KEEPS": False}),
    (turn, {**_TURN, "NORMED": True, "KEEPS": True}),
    (turn_back, {**_TURN, "NORMED": True}),
    (product, {**_FLOAT8, "BACK": False}),
    (product, {**_FLOAT8, "BACK": True}),
    (multiply_split, {**_FLOAT8, "ROWS": PLAIN_ROWS[2], "BIASED": False}),
    (multiply_split, {**_FLOAT8, "ROWS": PLAIN_ROWS[4], "BIASED": True}),
    (add_splits, {"SPLITS": MOST_SPLITS, "PLACES": ADDED, "BIASED": True}),
    (shrink_own, {**_OWN, "INNER": READ}),
    (expand_own, {**_OWN, "OUTPUTS": WRITTEN}),
    (add_gradients, {**_OWN, "OUTPUTS": WRITTEN}),
    (norm_sum, _NORM),
    (norm_back, _NORM),
    (gate_product, {**_GATE, "KIND": SILU}),
    (gate_back, {**_GATE, "KIND": TANH_GELU}),
    (sum_powers, {"TILE": LOGITS, "LOWEST": LOWEST}),
    (differentiate, {"TILE": LOGITS}),
    (sum_block, {"BLOCK": 1 << 15, "TILE": TILE}),
)
_NUMBERS = (
    *("query", "key", "value", "output", "x", "a", "b", "y"),
    *("heads", "cosines", "sines", "z", "h", "dh", "dy", "dx", "added", "total", "passed"),
    *("wide", "gradient", "queries", "keys", "values", "matrix", "bias"),
)  # of the case's type
_TENSORS = {
    "table": "*i32",
    "lengths": "*i64",
    "partial": "*fp32",
    "weight": "*fp32",
    "owners": "*i64",
    "column_owners": "*i64",
    "scales": "*fp32",
    "numbers": "*u8",
    "tiles": "*i32",
    "adapters": "*i64",
    "row_tiles": "*i64",
    "sides": "*i64",
    "inputs": "*i64",
    "outputs": "*i64",
    "targets": "*i64",
    "upstream": "*fp32",
    "words": "*i64",
    "factors": "*i64",
    "sums": "*i64",
    "logs": "*fp32",
    "slots": "*i64",
}
_SCALARS = {"scaling": "fp32", "softcap": "fp32", "eps": "fp32"}


def shared_bytes(kernel: Any, constexprs: dict[str, int], dtype: str, target: GPUTarget) -> int:
    """Compiles a kernel and returns the shared memory that a program takes."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in _NUMBERS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = _TENSORS.get(name) or _SCALARS.get(name, "i32")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name != "window")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


def target_of(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


def main() -> int:
    most = 0
    for capability, dtype, name, size, heads, key_heads, scores in CASES:
        query = torch.empty(1, heads, size, dtype=dtype)
        cache = torch.empty(1, BLOCK_TOKENS, key_heads, size, dtype=dtype)
        sets = (
            *constants(query, cache, cache, scores),
            constants(query, cache, cache, scores, tiled=True)[0],
        )
        own = attend_split, combine_splits, attend_split
        for kernel, constexprs in zip(own, sets, strict=True):
            most = max(most, shared_bytes(kernel, constexprs, name, target_of(capability)))
    kinds = itertools.product(CAPABILITIES, TYPES) if "--all" in sys.argv else FEW_KINDS
    for (capability, name), (kernel, constexprs) in itertools.product(kinds, OTHERS):
        most = max(most, shared_bytes(kernel, constexprs, name, target_of(capability)))
    return 0 if most <= 96 * 1024 else 1  # at least one program fits on every GPU of those kinds


if __name__ == "__main__":
    sys.exit(main())
