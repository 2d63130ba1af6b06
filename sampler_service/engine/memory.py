"""How much of free memory goes to the key/value cache and to adapters, and when it goes back."""

import dataclasses
import logging
import time
from collections.abc import Collection
from typing import NamedTuple

import psutil
import torch

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import stored_rank
from mint_core.model.base import LoadedBase
from mint_core.model.base_files import free_bytes
from sampler_service.config import SamplerConfig
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, BlockPool
from sampler_service.engine.cache.kv_cache import KvCache, LayerShape
from sampler_service.engine.cache.state_cache import slot_bytes

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.4  # of free memory: adapters, activations and a trainer beside us want some too
OWN_CACHE_SHARE = 0.6  # of a share that is all ours
# On a CPU other programs live in the same memory: what runs has so much at most, or a context of
# the model, and beginnings that nobody holds are kept in so much of it.
MOST_BYTES = 4 * 2**30
KEPT_BYTES = 2**30
SPARE_BYTES = 2 * 2**30  # that others should find free on the host, at most an eighth of it
# Of the cache's memory, for states: a slot for each that runs, and as many for those that are kept.
STATE_SHARE = 0.5
STATES_PER_SAMPLE = 2
LOOK_S = 1.0  # from one look at the host's memory to the next
ADAPTER_SHARE = 0.2  # of what is free after loading
HOST_SHARE = 0.2  # of free host memory, for adapters beside a GPU


class CacheSize(NamedTuple):
    """In blocks, but for the slots."""

    most: int
    kept: int  # on a CPU, also when nobody holds them
    slots: int = 0  # of states, where layers have some


def at_hand_bytes(config: SamplerConfig, device: torch.device) -> int:
    """Memory of the device for this engine: of its share, or its part of what is free."""
    if config.own_share:
        return free_bytes(device, config.own_share)
    if device.type == "cuda" and config.sharers > 1:
        raise FailedPrecondition(
            f"{config.sharers} replicas are on {device}, and each takes what it finds free; give "
            "`memory_share`, which they divide, or `devices` with one for each"
        )
    return free_bytes(device) // config.sharers


def cache_size(
    config: SamplerConfig, base: LoadedBase, shapes: Collection[LayerShape]
) -> CacheSize:
    """How many blocks the key/value cache may have, and slots for states beside them."""
    token_bytes = sum(shape.token_bytes for shape in shapes)
    share = OWN_CACHE_SHARE if config.own_share else CACHE_SHARE
    share_bytes = int(share * at_hand_bytes(config, base.device))
    slots = _slots(config, base, share_bytes)
    affordable = (share_bytes - slots * slot_bytes(base.mixers)) // token_bytes
    context = base.description.context_length
    modest = affordable
    if base.device.type == "cpu":
        modest = min(affordable, max(MOST_BYTES // config.sharers // token_bytes, context))
    # More than every running sample at full length is of no use.
    most = min(config.kv_cache_tokens or modest, context * config.max_running_samples)
    if not most // BLOCK_TOKENS:
        raise FailedPrecondition(
            f"there is room for {affordable} tokens in the key/value cache, and {BLOCK_TOKENS} are "
            "the least; free memory, or serve a smaller model or dtype"
        )
    if most > affordable:
        raise FailedPrecondition(
            f"`kv_cache_tokens` is {config.kv_cache_tokens} but free memory holds {affordable}; "
            "give less, or 0 to take what is free"
        )
    kept_bytes = KEPT_BYTES // config.sharers
    kept = most if config.kv_cache_tokens else min(most, kept_bytes // token_bytes)
    return CacheSize(most // BLOCK_TOKENS, kept // BLOCK_TOKENS, slots)


def _slots(config: SamplerConfig, base: LoadedBase, share_bytes: int) -> int:
    """For states, of so much memory of the cache's."""
    own_bytes = slot_bytes(base.mixers)
    if not own_bytes:
        return 0
    if base.device.type == "cpu":
        share_bytes = min(share_bytes, MOST_BYTES // config.sharers)
    affordable = int(STATE_SHARE * share_bytes) // own_bytes
    if affordable < STATES_PER_SAMPLE:
        raise FailedPrecondition(
            f"the states of one sequence take {own_bytes / 2**20:.0f} MiB in this model's layers, "
            f"and {STATE_SHARE * share_bytes / 2**20:.0f} MiB are at hand for them; free memory, "
            "or serve a smaller model"
        )
    return min(STATES_PER_SAMPLE * config.max_running_samples, affordable)


class Sparing:
    """Gives back what the cache has and does not need, once in LOOK_S, on a CPU: what is beyond
    `kept` and not held, and, when the host is short of memory, what is kept too, oldest first.
    """

    def __init__(self, pool: BlockPool, cache: KvCache, kept: int) -> None:
        self._pool = pool
        self._cache = cache
        self._kept = kept
        self._spare_bytes = min(SPARE_BYTES, psutil.virtual_memory().total // 8)
        self._looked_s = -LOOK_S
        self._told = False

    def look(self) -> None:
        if time.monotonic() - self._looked_s >= LOOK_S:
            self._looked_s = time.monotonic()
            self.spare(free_bytes(torch.device("cpu")))

    def spare(self, free: int) -> None:
        """Does so where so many bytes are free on the host."""
        block_bytes = self._cache.block_bytes
        lacking = -(-(self._spare_bytes - free) // block_bytes)
        given = self._pool.give_back(max(lacking, self._pool.used - self._kept, 0))
        self._cache.give_back(given)
        if lacking > 0 and given and not self._told:
            logger.warning(
                "less than %.1f GiB of memory are free on this host: what the kv cache kept goes "
                "back, and prompts are computed again",
                self._spare_bytes / 2**30,
            )
        self._told = lacking > 0 and (self._told or bool(given))


def within(model: ModelDescription, cache_tokens: int) -> ModelDescription:
    """The model with the context that the cache holds."""
    context_length = min(model.context_length, cache_tokens)
    logger.info("kv cache tokens=%d context_length=%d", cache_tokens, context_length)
    bound = model.memory_bound or context_length < model.context_length
    return dataclasses.replace(model, context_length=context_length, memory_bound=bound)


def rank_bytes(base: LoadedBase) -> int:
    """Of adapters of every layer, for each rank."""
    return 4 * sum(shape.in_features + shape.out_features for shape in base.shapes.values())


def affordable_ranks(config: SamplerConfig, base: LoadedBase) -> int:
    """The largest sum of stored ranks that memory for adapters holds; one adapter always fits."""
    free = int(ADAPTER_SHARE * at_hand_bytes(config, base.device))
    memory_bytes = config.adapter_memory_mib * 2**20 or free
    return max(memory_bytes // rank_bytes(base), stored_rank(base.description.max_lora_rank))


def host_bytes(config: SamplerConfig, base: LoadedBase) -> int:
    """Host memory for adapters beside a GPU."""
    if base.device.type == "cpu":
        return 0
    free = int(HOST_SHARE * free_bytes(torch.device("cpu")))
    return config.host_adapter_memory_mib * 2**20 or free // config.replicas
