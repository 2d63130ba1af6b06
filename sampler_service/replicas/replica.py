"""One of a sampler's engines, and what is in it as far as its front knows."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mint_core.engine_host.process import EngineProcess
from sampler_service.adapters.leases import AdapterLeases
from sampler_service.adapters.revisions import Revision
from sampler_service.replicas.choice import Standing
from sampler_service.replicas.prompts import Beginnings, KeptPrompts


@dataclass(eq=False)
class Replica:
    name: str
    engine: EngineProcess
    leases: AdapterLeases
    device: str = "auto"  # as it was asked for
    leaving: bool = False  # takes no more requests
    cache_tokens: int = 0  # that its engine may keep
    under_way: Counter[str] = field(default_factory=Counter)  # tokens by tenant, as foreseen
    requests: int = 0  # under way
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    following: "tuple[asyncio.Task[None], ...]" = ()  # what goes on while it is there
    _kept: KeptPrompts = field(default_factory=KeptPrompts)
    _life: int = 1  # of the engine that keeps them

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def kept(self) -> KeptPrompts:
        """What its engine has of prompts; the next one begins with none."""
        if self._life != self.engine.life:
            self._life, self._kept = self.engine.life, KeptPrompts()
        return self._kept

    def standing(self, prompt: Beginnings, revision: Revision | None) -> Standing:
        return Standing(
            under_way=self.under_way,
            warm_tokens=self.kept.common(prompt),
            adapter=self.leases.coming(revision),
            kept_tokens=self.kept.tokens,
        )

    @contextmanager
    def working(self, tenant: str, tokens: int) -> Iterator[None]:
        """Holds a request of so many tokens while it goes on."""
        self.requests += 1
        self.under_way[tenant] += tokens
        self.idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            self.under_way[tenant] -= tokens
            if not self.under_way[tenant]:
                del self.under_way[tenant]
            if not self.requests:
                self.idle.set()
