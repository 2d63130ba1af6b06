"""Who comes in, and as which tenant: by an API key, by a certificate, or by both."""

from typing import Any, Literal

from mint_core.errors import Unauthenticated
from mint_core.rpc.access import TENANT, KeyRing
from mint_core.rpc.caller import DEFAULT_TENANT
from mint_core.rpc.tls import Tls, dns_names

TenantBy = Literal["auto", "key", "certificate", "both"]


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

    def tenant_of(self, context: Any) -> str:
        """The tenant of a call, by today's keys and authorities. Raises Unauthenticated."""
        tenants = []
        peer = self._tls.check(context.auth_context()) if self._tls else None
        if peer is not None and self._by_certificate:
            tenants.append(_tenant(dns_names(peer)))
        if self._by_key:
            assert self._keys is not None
            tenants.append(self._keys.tenant_of(_key(context)))
        if len(set(tenants)) > 1:
            raise Unauthenticated(
                f"the certificate is of tenant {tenants[0]}, and the API key of {tenants[1]}; "
                "use a pair of one tenant"
            )
        return tenants[0] if tenants else DEFAULT_TENANT


def _tenant(names: list[str]) -> str:
    if len(names) != 1 or not TENANT.fullmatch(names[0]):
        raise Unauthenticated(
            f"the client's certificate has {len(names)} DNS names, and this server takes the only "
            "one of them as the tenant; use a certificate made for that"
        )
    return names[0]


def _key(context: Any) -> str | None:
    metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
    scheme, _, key = metadata.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return metadata.get("x-api-key")
