"""What a caller must be allowed to do for each RPC."""

from typing import Literal

Scope = Literal["train", "sample", "read", "admin", "fetch"]
TenantBy = Literal["auto", "key", "certificate", "both"]  # what says whose a call is

# What computes and changes nothing of runs and checkpoints; who may train may read too.
_READS = ("Get", "List", "Watch", "Download")
# What samplers ask of trainers: a key of `fetch` may say for which tenant, and gets adapters alone.
_FETCHES = ("CheckpointService/GetCheckpoint", "CheckpointService/DownloadCheckpoint")
_ENOUGH: dict[Scope | None, frozenset[str]] = {
    "read": frozenset({"train"}),
    "fetch": frozenset({"train", "read"}),
}
_OF_SERVICE: dict[str, Scope | None] = {
    "": None,  # an RPC that there is not
    "ModelService": None,
    "TrainerService": "train",
    "CheckpointService": "train",
    "SamplerService": "sample",
    "AdminService": "admin",
}


def scope_of(method: str) -> Scope | None:
    """Of `/package.Service/Method`; None: any caller may. A service that is not known is an
    administrator's.
    """
    if method.endswith(_FETCHES):
        return "fetch"
    service, _, name = method.rpartition("/")
    scope = _OF_SERVICE.get(service.rpartition(".")[2], "admin")
    return "read" if scope == "train" and name.startswith(_READS) else scope


def allows(scopes: frozenset[str], wanted: Scope | None) -> bool:
    return wanted is None or wanted in scopes or not scopes.isdisjoint(_ENOUGH.get(wanted, ()))


def changes(method: str) -> bool:
    """Whether an RPC changes something, so that it is a matter of record."""
    _, _, name = method.rpartition("/")
    scope = scope_of(method)
    return scope in ("train", "admin") and name != "Forward" and not name.startswith(_READS)
