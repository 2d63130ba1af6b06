"""What is said of the served model, and what that waits for."""

from dataclasses import replace
from pathlib import Path

from mint_core.rpc.model_service import ModelServicer
from mintrpc.v1 import model_pb2
from tests.busy_threads import no_thread_free
from tests.unit.trainer_service.models import MODEL


async def test_a_server_that_trades_bits_for_speed_says_so() -> None:
    offer = model_pb2.GetServerCapabilitiesResponse()
    for traded in (False, True):
        model = replace(MODEL, bits_traded_for_speed=traded, folder="")
        servicer = ModelServicer(lambda model=model: model, lambda: True, offer)  # type: ignore[misc]
        request = model_pb2.GetServerCapabilitiesRequest()
        assert (await servicer.GetServerCapabilities(request, None)).bits_traded_for_speed is traded


async def test_what_is_known_is_answered_though_no_thread_is_free(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = replace(MODEL, folder=str(tmp_path))
    offer = model_pb2.GetServerCapabilitiesResponse()
    servicer = ModelServicer(lambda: model, lambda: True, offer)
    request = model_pb2.GetServerCapabilitiesRequest()
    first = await servicer.GetServerCapabilities(request, None)

    async with no_thread_free():
        assert await servicer.GetServerCapabilities(request, None) == first

    assert first.base_models[0].tokenizer_fingerprint
