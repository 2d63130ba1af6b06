"""Which replica a request goes to: the one that has to compute the least until it ends.

All is counted in tokens. What a replica keeps of the request's prompt it need not compute, and an
adapter that is not there costs some; so a request goes where its prompt and adapter are until what
is under way there, as far as it comes first, costs more than to begin elsewhere. Neither is bound
to a replica: what is wanted more than one can give is soon at others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sampler_service.adapters.coming import Coming


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is known of a request before it begins."""

    tenant: str
    prompt_tokens: int
    continuation_tokens: int  # of all samples, as far as can be foreseen


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica is to one request."""

    under_way: Mapping[str, int]  # tokens of what has not ended, by tenant
    warm_tokens: int = 0  # of the prompt, that it need not compute
    adapter: Coming = Coming.THERE
    kept_tokens: int = 0  # of other prompts, that would have to make room


def choose(wanted: Wanted, standings: Sequence[Standing]) -> int:
    """The index of a replica: of the cheapest, that which keeps the least, of these the first."""
    costs = [(cost(wanted, each), each.kept_tokens) for each in standings]
    return costs.index(min(costs))


def cost(wanted: Wanted, standing: Standing) -> int:
    """Tokens until the request has ended there. Tenants have equal shares of an engine: what others
    have under way counts as far as the tenant's own work goes.
    """
    cold_tokens = wanted.prompt_tokens - standing.warm_tokens
    tenant, under_way = wanted.tenant, standing.under_way
    own = under_way.get(tenant, 0) + cold_tokens + wanted.continuation_tokens
    others = sum(min(own, tokens) for name, tokens in under_way.items() if name != tenant)
    return own + others + standing.adapter
