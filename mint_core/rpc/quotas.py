"""What one tenant may have at the same time, so that no other feels it: settings and accounts."""

import dataclasses
import logging
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mint_core.errors import FailedPrecondition, MintError, ResourceExhausted
from mint_core.rpc.metrics import Metrics
from mint_core.watched_file import WatchedFile, read_file

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # for what is free again when a call ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Of one tenant. The defaults are such that honest use does not meet them."""

    calls: int = 16_384  # RPCs under way
    streams: int = 1024  # of these, those that stream
    request_mib: int = 1024  # of requests under way
    runs: int = 20_000
    row_gib: int = 1024  # of weights, gradients and moments of runs
    exports: int = 256  # that wait or are made
    request_ids: int = 200_000  # that are remembered, each for a day, in some 400 bytes


class QuotaExceeded(ResourceExhausted):
    """The tenant has as much of something as it may have."""

    reason = "QUOTA_EXCEEDED"


class QuotaBook:
    """The quotas of each tenant, by a TOML file that is read again when it has changed: numbers for
    every tenant at its beginning, and for one of them under `[tenant.NAME]`.
    """

    def __init__(self, file: Path | None, metrics: Metrics) -> None:
        self._file = WatchedFile(file) if file else None
        self._refusals = metrics.counter(
            "mint_quota_refusals", "Calls that a tenant's quota has refused", ["quota"]
        )
        self.accounts: list[Account] = []
        metrics.table(
            "mint_quota_used", "What tenants hold of a quota", ("quota", "tenant"), self.used
        )
        self._default, self._tenants = _read(file)

    def of(self, tenant: str) -> Quotas:
        if self._file is not None and self._file.changed():
            try:
                self._default, self._tenants = _read(self._file.path)
                logger.info("quotas read again file=%s", self._file.path)
            except MintError as error:
                # An editor's half-written file must not change what anybody may have.
                logger.error("quotas kept as they were: %s", error.message)
        return self._tenants.get(tenant, self._default)

    def used(self) -> Mapping[tuple[str, ...], float]:
        """What tenants hold, by quota and tenant."""
        return {
            (account.quota, tenant): held / account.unit
            for account in self.accounts
            for tenant, held in dict(account.held).items()  # at once: a thread reads it
        }

    def check(
        self, tenant: str, quota: str, held: float, what: str, remedy: str, *, passes: bool
    ) -> None:
        """Raises QuotaExceeded if a tenant would hold more than a quota."""
        limit = getattr(self.of(tenant), quota)
        if held <= limit:
            return
        self._refusals.labels(quota).inc()
        raise QuotaExceeded(
            f"this would be {held:,.10g} {what} of yours, and the quota `{quota}` of this server "
            f"allows {limit:,}; {remedy}",
            retry_after_s=RETRY_S if passes else None,
            quota=quota,
            limit=limit,
        )


class Account:
    """How much of one thing each tenant holds."""

    def __init__(
        self,
        book: QuotaBook,
        quota: str,
        what: str,
        remedy: str,
        *,
        unit: int = 1,
        passes: bool = False,
    ) -> None:
        """`unit`: how many of what is held make one of the quota's. `passes`: it is held while
        calls are under way, so that a client should come again by itself; what one call holds alone
        is never too much then.
        """
        self.quota = quota
        self.unit = unit
        self.held: Counter[str] = Counter()
        self._book = book
        self._words = what, remedy
        self._passes = passes
        book.accounts.append(self)

    def check(self, tenant: str, amount: int) -> None:
        """Raises QuotaExceeded if the tenant may not hold so much more."""
        if self.held[tenant] or not self._passes:
            total = (self.held[tenant] + amount) / self.unit
            self._book.check(tenant, self.quota, total, *self._words, passes=self._passes)

    def add(self, tenant: str, amount: int) -> None:
        """Notes what a tenant holds, or no longer does, whatever the quota."""
        self.held[tenant] += amount
        if not self.held[tenant]:
            del self.held[tenant]

    @contextmanager
    def holding(self, tenant: str, amount: int) -> Iterator[None]:
        """Raises QuotaExceeded if that would be too much."""
        self.check(tenant, amount)
        self.add(tenant, amount)
        try:
            yield
        finally:
            self.add(tenant, -amount)


def _read(file: Path | None) -> tuple[Quotas, Mapping[str, Quotas]]:
    """The quotas of any tenant, and those of some."""
    if file is None:
        return Quotas(), {}
    try:
        content: dict[str, Any] = tomllib.loads(read_file(file).decode())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FailedPrecondition(f"`quotas` file {file} cannot be read: {why}") from error
    tenants = content.pop("tenant", {})
    default = _quotas(Quotas(), content, file, "its beginning")
    if not isinstance(tenants, dict):
        tenants = {"": tenants}
    return default, {
        name: _quotas(default, given, file, f"[tenant.{name}]") for name, given in tenants.items()
    }


def _quotas(default: Quotas, given: object, file: Path, where: str) -> Quotas:
    names = [entry.name for entry in dataclasses.fields(Quotas)]
    numbers = given if isinstance(given, dict) else {"": given}
    for name, value in numbers.items():
        if name not in names or type(value) is not int or value < 0:
            raise FailedPrecondition(
                f"`quotas` file {file} has a bad `{name} = {value!r}` at {where}; it takes whole "
                f"numbers for {', '.join(names)}"
            )
    return dataclasses.replace(default, **numbers)
