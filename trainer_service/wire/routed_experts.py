"""The experts that a datum's tokens go to: bytes in, checked array out."""

import numpy as np
from numpy.typing import NDArray

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest

ROUTERS_CHOICE = 65535
_LAYOUT = np.dtype("<u2")


def parse_routed_experts(
    given: bytes, field: str, tokens: int, model: ModelDescription
) -> NDArray[np.int32] | None:
    """[tokens, layers, experts of a token], -1 where the router chooses; None if nothing is given.
    Raises InvalidRequest.
    """
    if not given:
        return None
    if model.routed is None:
        raise InvalidRequest(
            f"`{field}` is set but {model.name} has no experts; leave it out", field=field
        )
    shape = tokens, model.routed.layers, model.routed.per_token
    wanted = tokens * model.routed.layers * model.routed.per_token * _LAYOUT.itemsize
    if len(given) != wanted:
        raise InvalidRequest(
            f"`{field}` has {len(given)} bytes but must have {wanted}: 2 for each of {shape[0]} "
            f"tokens, {shape[1]} layers with experts and {shape[2]} experts of a token",
            field=field,
            size_bytes=len(given),
        )
    ids = np.frombuffer(given, _LAYOUT).reshape(shape).astype(np.int32)
    ids[ids == ROUTERS_CHOICE] = -1
    _check(ids, field, model.routed.experts)
    return ids


def _check(ids: NDArray[np.int32], field: str, experts: int) -> None:
    """Refuses what is no expert, and choices of which a part is the router's or which are alike."""
    in_order = np.sort(ids, axis=2)
    chosen = in_order[:, :, 0] >= 0
    _refuse_where(
        in_order[:, :, -1] >= experts, field, f"names an expert beyond {experts - 1}, the last"
    )
    _refuse_where(
        ~chosen & (in_order[:, :, -1] >= 0), field, f"has {ROUTERS_CHOICE} in some places alone"
    )
    twice = (in_order[:, :, 1:] == in_order[:, :, :-1]).any(axis=2)
    _refuse_where(chosen & twice, field, "names an expert twice")


def _refuse_where(wrong: NDArray[np.bool_], field: str, problem: str) -> None:
    if not wrong.any():
        return
    token, layer = np.argwhere(wrong)[0].tolist()
    raise InvalidRequest(
        f"`{field}` {problem}, for token {token} in layer {layer} of those with experts; give "
        f"different experts of this base model, or {ROUTERS_CHOICE} in all places of the token and "
        "layer for the router's own choice",
        field=field,
        token=token,
        layer=layer,
    )
