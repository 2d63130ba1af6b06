"""The gated delta rule by the kernels of `fla` (flash-linear-attention), where it is installed.

They are for GPUs and weights of 16 bits. Each would try several blocks and keep the fastest, whose
sums differ in their last bits: here each has one choice, the same in every process.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mint_core.model.mixers.runs import Runs

WARPS = 4  # of the choice that is kept, where there is one; Triton's own default


def fla_computes(weight: Tensor) -> bool:
    """Whether a layer with such weights is computed by them."""
    sixteen = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.is_cuda and sixteen and find_spec("fla") is not None


def recalled_by_fla(
    heads: Sequence[Tensor],  # queries, keys, values, each [R, h, ...], run after run
    fading: Tensor,  # [R, h] float32
    rates: Tensor,  # [R, h] float32
    runs: Runs,
    state: Tensor | None,  # [D, h, k, v] float32 with which the runs begin; None: zeros
    dtype: torch.dtype,  # of queries, keys and values in products; sums are float32
) -> tuple[Tensor, Tensor | None]:  # [T, h v]; states after the runs, None without `state`
    """As `delta_rule.recalled`, but for the order of rows."""
    output, after = _kernels()(
        *(x.to(dtype)[None] for x in heads),
        fading.contiguous()[None],
        rates.contiguous()[None],
        scale=1.0,
        initial_state=state,
        output_final_state=state is not None,
        cu_seqlens=runs.one_by_one.bounds,
        cu_seqlens_cpu=runs.one_by_one.bounds_on_host,
    )
    return runs.one_by_one.join(output[0].flatten(1).float()), after


@cache
def _kernels() -> Any:
    found = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    triton = importlib.import_module("triton.runtime.autotuner")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for kernel in list(vars(module).values()):
                _keep_one_choice(kernel, triton)
    return found


def _keep_one_choice(kernel: Any, triton: Any) -> None:
    while isinstance(kernel, triton.KernelInterface):
        if isinstance(kernel, triton.Autotuner):
            of_four = [each for each in kernel.configs if each.num_warps == WARPS]
            kernel.configs = (of_four or kernel.configs)[:1]
        kernel = getattr(kernel, "fn", None)
