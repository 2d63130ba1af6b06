"""Who comes in, and as which tenant: by an API key, by a certificate, or by both."""

from dataclasses import dataclass
from typing import Any

from mint_core.access.key_file import SCOPES, TENANT, USUAL
from mint_core.access.key_ring import KeyRing
from mint_core.access.scopes import Scope, TenantBy, allows
from mint_core.access.tls import Tls, dns_names
from mint_core.errors import PermissionDenied, Unauthenticated

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Guest:
    """Who was let in. Without keys and certificates he may do all: he is on this host."""

    tenant: str
    scopes: frozenset[str]
    key_id: str = ""  # empty: he came without


class Door:
    """What keys and certificates say. Without either, all callers are the tenant `default`."""

    def __init__(
        self, keys: KeyRing | None, tls: Tls | None = None, tenant_by: TenantBy = "auto"
    ) -> None:
        self._keys = keys
        self._tls = tls
        asks = tls is not None and tls.asks_clients
        self._by_key = keys is not None and tenant_by != "certificate"
        self._by_certificate = asks and (
            tenant_by in ("certificate", "both") or (tenant_by == "auto" and keys is None)
        )

    @property
    def tells_tenants(self) -> bool:
        """Whether callers are known, so that there are tenants."""
        return self._by_key or self._by_certificate

    def weight_of(self, tenant: str) -> float:
        """How many times the share of a tenant of weight 1 is a tenant's."""
        return self._keys.weight_of(tenant) if self._keys else 1.0

    def version(self) -> tuple[int, ...]:
        """Of keys and certificates, read again if need be. Who was let in by others may have to
        go.
        """
        read = [source for source in (self._keys, self._tls) if source is not None]
        for source in read:
            source.refresh()
        return tuple(source.version for source in read)

    def admit(self, context: Any, wanted: Scope | None) -> Guest:
        """Who makes a call, by today's keys and authorities. Raises Unauthenticated, and
        PermissionDenied where he may not.
        """
        found = self._who(context)
        if not allows(found.scopes, wanted):
            wanted = "read" if wanted == "fetch" else wanted  # which is a person's
            raise PermissionDenied(
                f"the API key {found.key_id} of tenant {found.tenant} may "
                f"{', '.join(sorted(found.scopes))}, and this call takes `{wanted}`; use another "
                "key",
                scope=wanted,
            )
        return found

    def _who(self, context: Any) -> Guest:
        peer = self._tls.check(context.auth_context()) if self._tls else None
        named = _tenant(dns_names(peer)) if peer is not None and self._by_certificate else None
        if not self._by_key:
            return Guest(named or DEFAULT_TENANT, USUAL if named else frozenset(SCOPES))
        assert self._keys is not None
        key = self._keys.find(_key(context))
        if named not in (None, key.tenant):
            raise Unauthenticated(
                f"the certificate is of tenant {named}, and the API key of {key.tenant}; use a "
                "pair of one tenant"
            )
        return Guest(key.tenant, key.scopes, key.id)


def _tenant(names: list[str]) -> str:
    if len(names) != 1 or not TENANT.fullmatch(names[0]):
        raise Unauthenticated(
            f"the client's certificate has {len(names)} DNS names, and this server takes the only "
            "one of them as the tenant; use a certificate made for that"
        )
    return names[0]


def _key(context: Any) -> str | None:
    """The one key of a call. Of two, whoever stands in between may have looked at the other."""
    keys = set()
    for name, value in context.invocation_metadata() or ():
        scheme, _, key = str(value).partition(" ")
        if name == "authorization" and scheme.lower() == "bearer":
            keys.add(key.strip())
        elif name == "x-api-key":
            keys.add(str(value).strip())
    keys.discard("")
    if len(keys) > 1:
        raise Unauthenticated(f"the call carries {len(keys)} API keys; send one")
    return next(iter(keys), None)
