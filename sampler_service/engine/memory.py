"""How much of free memory goes to the key/value cache and to adapters."""

import dataclasses
import logging
from collections.abc import Collection

import torch

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import stored_rank
from mint_core.model.loading import LoadedBase, free_bytes
from sampler_service.config import SamplerConfig
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.cache.kv_cache import LayerShape

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.4  # of free memory: adapters, activations and a trainer beside us want some too
ADAPTER_SHARE = 0.2  # of what is free after loading
HOST_SHARE = 0.2  # of free host memory, for adapters beside a GPU


def cache_blocks(config: SamplerConfig, base: LoadedBase, shapes: Collection[LayerShape]) -> int:
    """How many blocks the key/value cache gets."""
    token_bytes = sum(shape.token_bytes for shape in shapes)
    affordable = int(CACHE_SHARE * free_bytes(base.device) / token_bytes)
    # More than every running sample at full length is of no use.
    most = base.description.context_length * config.max_running_samples
    blocks = min(config.kv_cache_tokens or affordable, most) // BLOCK_TOKENS
    if not blocks:
        raise FailedPrecondition(
            f"there is room for {affordable} tokens in the key/value cache, and {BLOCK_TOKENS} are "
            "the least; free memory, or serve a smaller model or dtype"
        )
    if blocks * BLOCK_TOKENS > affordable:
        raise FailedPrecondition(
            f"`kv_cache_tokens` is {config.kv_cache_tokens} but free memory holds {affordable}; "
            "give less, or 0 to take what is free"
        )
    return blocks


def within(model: ModelDescription, cache_tokens: int) -> ModelDescription:
    """The model with the context that the cache holds."""
    context_length = min(model.context_length, cache_tokens)
    logger.info("kv cache tokens=%d context_length=%d", cache_tokens, context_length)
    bound = model.memory_bound or context_length < model.context_length
    return dataclasses.replace(model, context_length=context_length, memory_bound=bound)


def affordable_ranks(config: SamplerConfig, base: LoadedBase) -> int:
    """The largest sum of stored ranks that memory for adapters holds; one adapter always fits."""
    free = int(ADAPTER_SHARE * free_bytes(base.device))
    memory_bytes = config.adapter_memory_mib * 2**20 or free
    rank_bytes = 4 * sum(shape.in_features + shape.out_features for shape in base.shapes.values())
    return max(memory_bytes // rank_bytes, stored_rank(base.description.max_lora_rank))


def host_bytes(config: SamplerConfig) -> int:
    """Host memory for adapters beside a GPU."""
    free = int(HOST_SHARE * free_bytes(torch.device("cpu")))
    return config.host_adapter_memory_mib * 2**20 or free
