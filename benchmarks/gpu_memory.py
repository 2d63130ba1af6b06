"""What limits the tenants of a GPU: memory of weights, rows, the key/value cache and passes, by
what the engines themselves compute, and how many tenants the defaults hold in one of so many GB.

`python -m benchmarks.gpu_memory [--gb 141] [--host-gb 512]`, on a CPU. Models of one and of two
layers are measured, the rest is counted on; a CPU's forms of layers keep more than a GPU's.
"""

import argparse
from dataclasses import dataclass

import torch
from transformers import Qwen3Config

from benchmarks.gpu_models import CONFIGS, model_of
from mint_core.lora.bank import Part
from mint_core.model.loading import load_base
from sampler_service.engine.memory import CACHE_SHARE
from trainer_service.config import TrainerConfig
from trainer_service.engine.memory import MEMORY_SHARE, MOST_BATCH_TOKENS, measure
from trainer_service.engine.rows import DEVICE_SHARE, HOST_SHARE

RANKS = (8, 32, 128)
GB = 1e9
BYTES = 2  # of a number in bfloat16
AT_REST = (Part.WEIGHTS, Part.EXP_AVG, Part.EXP_AVG_SQ)
IN_PASS = (Part.WEIGHTS, Part.GRADIENT)


@dataclass(frozen=True)
class Sizes:
    """Bytes."""

    weights: float
    parts: tuple[float, ...]  # one part of a row, by RANKS
    token: float  # of a pass, all kept for backward
    recomputed_token: float  # layers computed again


def sizes(config: Qwen3Config) -> Sizes:
    with model_of(config, torch.device("cpu")) as folder:
        base = load_base(TrainerConfig(base_model=str(folder), dtype="bfloat16", device="cpu"))
    bank = base.new_bank()
    memory = measure(base, max(RANKS))
    return Sizes(
        weights=sum({p.data_ptr(): p.nbytes for p in base.model.parameters()}.values()),
        parts=tuple(bank.rank_class(rank).part_bytes for rank in RANKS),
        token=memory.pass_bytes(MOST_BATCH_TOKENS["cuda"]) / MOST_BATCH_TOKENS["cuda"],
        recomputed_token=memory.recomputed_pass_bytes(2**15) / 2**15,
    )


def counted(config: Qwen3Config) -> Sizes:
    """Of the whole model, from one layer and two."""
    layers = config.num_hidden_layers
    one, two = (sizes(type(config)(**{**config.to_dict(), **_layers(n)})) for n in (1, 2))

    def whole(first: float, second: float) -> float:
        return first + (layers - 1) * (second - first)

    return Sizes(
        whole(one.weights, two.weights),
        tuple(map(whole, one.parts, two.parts)),
        whole(one.token, two.token),
        whole(one.recomputed_token, two.recomputed_token),
    )


def _layers(count: int) -> dict[str, object]:
    return {"num_hidden_layers": count, "layer_types": None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=141.0)
    parser.add_argument("--host-gb", type=float, default=512.0)
    options = parser.parse_args()
    for name in ("0.6B", "8B"):
        config = CONFIGS[name]
        found = counted(config)
        heads = config.num_hidden_layers * config.num_key_value_heads
        kv_bytes = 2 * heads * config.head_dim * BYTES
        free = options.gb * GB - found.weights
        print(
            f"{name}: weights {found.weights / GB:.1f} GB; a token of the cache "
            f"{kv_bytes / 2**10:.0f} KiB, of a pass {found.token / 2**20:.2f} MiB, recomputed "
            f"{found.recomputed_token / 2**20:.2f} MiB; alone on the GPU, passes of "
            f"{MEMORY_SHARE['cuda'] * free / found.token:,.0f} tokens, or a cache of "
            f"{CACHE_SHARE * free / kv_bytes:,.0f}"
        )
        room, host = DEVICE_SHARE * free, HOST_SHARE * options.host_gb * GB
        for rank, part in zip(RANKS, found.parts, strict=True):
            print(
                f"  rank {rank}: a part of a row {part / 2**20:.1f} MiB; runs on the GPU whole "
                f"{room / (len(Part) * part):,.0f}, between their steps "
                f"{room / (len(IN_PASS) * part):,.0f}, at rest in the host's memory "
                f"{host / (len(AT_REST) * part):,.0f}"
            )


if __name__ == "__main__":
    main()
