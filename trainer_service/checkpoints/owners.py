"""Whose checkpoint a call asks for: its caller's, or that of the tenant for whom a sampler asks."""

from checkpoint_store import SAMPLER_WEIGHTS, parse_path
from mint_core.access.scopes import allows
from mint_core.errors import PermissionDenied
from mint_core.rpc.caller import caller
from mintrpc.v1 import checkpoint_pb2


def owner_of(
    request: checkpoint_pb2.GetCheckpointRequest | checkpoint_pb2.DownloadCheckpointRequest,
) -> str:
    """Raises PermissionDenied where the caller may not ask for that tenant; what samplers ask for,
    and those who may no more than they, is an adapter.
    """
    who, tenant = caller(), request.for_tenant
    if tenant not in ("", who.tenant) and "fetch" not in who.scopes:
        raise PermissionDenied(
            f"`for_tenant` is {tenant!r} and the caller is tenant {who.tenant}, whose key has not "
            "the scope `fetch`; use a key that has it",
            scope="fetch",
        )
    if tenant or not allows(who.scopes, "read"):
        parse_path(request.path, kind=SAMPLER_WEIGHTS)
    return tenant or who.tenant
