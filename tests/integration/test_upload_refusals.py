"""Uploads that cannot be: each is refused by the name of what is wrong, and leaves nothing."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import mint
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from tests.peft_folders import CONFIG, WEIGHTS, change_config, change_tensors, save_adapter
from tests.services import SERVED_NAME, Services
from tests.trainer_rpc import CALL_LIMIT_S, Refusal, refusal

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
Break = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]
Part = checkpoint_pb2.UploadCheckpointRequest


@pytest.fixture
def untouched(services: Services) -> Iterator[None]:
    """Compares all that lies in the store before and after; a caller that has left is not told
    when the server has cleaned up.
    """
    before = everything_in(services.store)
    yield
    deadline = time.monotonic() + CALL_LIMIT_S
    while (now := everything_in(services.store)) != before:
        assert time.monotonic() < deadline, f"left behind: {now - before}"
        time.sleep(0.02)


def everything_in(folder: Path) -> set[str]:
    """All paths in `folder`, without the snapshots of the other tests' runs, which come and go."""
    paths = (path for path in folder.rglob("*") if path.name != ".staging")
    return {str(path.relative_to(folder)) for path in paths if path.parent.name != "snapshots"}


# What PEFT itself makes and is not supported.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "task_type": ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
    "trainable_tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "rank": ({"r": 256}, "r"),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_what_peft_makes_and_is_not_supported(
    kind: str, services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    config, name = CONFIGURATIONS[kind]
    folder = save_adapter(services.model, tmp_path / "theirs", **config)

    error = refused(service, folder)

    assert error.metadata["field"] == f"{CONFIG}.{name}"


def test_an_embeddings_adapter(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs", target_modules=["embed_tokens"])
    assert "an embedding's adapter" in str(refused(service, folder))


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def append(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")


def pickled(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS)


def tensors(change: Callable[[Tensors], object]) -> Break:
    return lambda folder: change_tensors(folder, change)


def spoil(number: float) -> Break:
    def change(found: Tensors) -> None:
        found[f"{Q_PROJ}.lora_B.weight"][3, 1] = number

    return tensors(change)


def reshape(found: Tensors) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    found[name] = found[name][:, :32].contiguous()


def add(name: str) -> Break:
    return tensors(lambda found: found.update({name: torch.ones(4, 4)}))


BROKEN: dict[str, tuple[Break, str, str]] = {  # how, field, words
    "nan": (spoil(float("nan")), WEIGHTS, "adapters must be finite"),
    "infinity": (spoil(float("inf")), WEIGHTS, "adapters must be finite"),
    "another_shape": (tensors(reshape), WEIGHTS, r"in the shape \[8, 32\].*need \[8, 64\]"),
    "another_rank": (lambda f: change_config(f, r=4), WEIGHTS, r"need \[4, 64\]"),
    "half_a_module": (
        tensors(lambda found: found.pop(f"{Q_PROJ}.lora_B.weight")),
        WEIGHTS,
        "lacks `.*lora_B.weight`",
    ),
    "integers": (
        tensors(lambda found: found.update({n: t.to(torch.int8) for n, t in found.items()})),
        WEIGHTS,
        "as I8; tensors must be of",
    ),
    "several_adapters": (
        add(f"{Q_PROJ}.lora_A.second.weight"),
        WEIGHTS,
        "several adapters, as `lora_A.weight`, `lora_A.second.weight` tell",
    ),
    "no_such_layer": (
        add("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"),
        WEIGHTS,
        "has no such linear layer",
    ),
    "magnitudes": (add(f"{Q_PROJ}.lora_magnitude_vector"), WEIGHTS, "is DoRA"),
    "a_stranger": (add("base_model.model.value_head.weight"), WEIGHTS, "neither A nor B"),
    "trained_embeddings": (
        add("base_model.model.model.embed_tokens.weight"),
        WEIGHTS,
        "with other numbers than the base model's",
    ),
    "nothing": (tensors(lambda found: found.clear()), WEIGHTS, "holds no adapter"),
    "cut_off": (cut, WEIGHTS, "not fully covered"),
    "too_long": (append, WEIGHTS, "not fully covered"),
    "a_pickle": (pickled, WEIGHTS, "is a pickle, which could run code"),
    "no_safetensors": (
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64),
        WEIGHTS,
        "is no whole safetensors file: header too large",
    ),
    "no_json": (lambda f: (f / CONFIG).write_text("r: 8"), CONFIG, "is no JSON object"),
    "another_method": (
        lambda f: change_config(f, peft_type="IA3"),
        f"{CONFIG}.peft_type",
        '"IA3", which is not supported',
    ),
    "an_option_of_tomorrow": (
        lambda f: change_config(f, use_hyperlora=True),
        f"{CONFIG}.use_hyperlora",
        "`use_hyperlora` to true, which is not supported",
    ),
    "other_targets": (
        lambda f: change_config(f, target_modules=["v_proj"]),
        f"{CONFIG}.target_modules",
        "which `target_modules` does not name",
    ),
    "more_targets": (
        lambda f: change_config(f, target_modules=["q_proj", "v_proj"]),
        f"{CONFIG}.target_modules",
        "v_proj`, of which",
    ),
    "no_rank": (lambda f: change_config(f, r=0), f"{CONFIG}.r", "at least 1"),
    "alpha_of_zero": (
        lambda f: change_config(f, lora_alpha=0),
        f"{CONFIG}.lora_alpha",
        "above 0",
    ),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder(
    kind: str, services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    damage, field, words = BROKEN[kind]
    folder = save_adapter(services.model, tmp_path / "theirs")
    damage(folder)

    error = refused(service, folder)

    assert error.metadata["field"] == field
    assert re.search(words, str(error)), error


@pytest.mark.usefixtures("untouched")
def test_an_adapter_of_another_base_tells_by_its_fingerprint(
    services: Services, service: mint.ServiceClient, tmp_path: Path, llama_folder: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_adapter(services.model, tmp_path / "theirs")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"base_fingerprint": "ab12"})

    assert "fingerprint ab12" in str(refused(service, folder))


def test_a_folder_without_an_adapter_is_not_sent(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    folder = save_adapter(services.model, tmp_path / "theirs")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    for broken, words in ((folder, "is a pickle"), (tmp_path / "nowhere", f"no `{CONFIG}`")):
        with pytest.raises(mint.InvalidInputError, match=words):
            rest.upload_checkpoint(broken, "a").result(CALL_LIMIT_S)
    folder = save_adapter(services.model, tmp_path / "whole")
    with pytest.raises(mint.InvalidInputError, match=r"no `optimizer\.safetensors`"):
        rest.upload_checkpoint(folder, "a", with_optimizer=True).result(CALL_LIMIT_S)


def refused(service: mint.ServiceClient, folder: Path) -> mint.APIStatusError:
    """Sends an upload that must be refused, and no run is there of it."""
    rest = service.create_rest_client()
    upload = rest.upload_checkpoint(folder, "theirs", base_model=SERVED_NAME)
    with pytest.raises(mint.BadRequestError) as caught:
        upload.result(CALL_LIMIT_S)
    return caught.value


# What clients of other makes could send.


def parts_of(folder: Path, **header: Any) -> list[Part]:
    """An upload as it should be, for tests to change."""
    files, pieces = [], []
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        files.append(checkpoint_pb2.CheckpointFile(name=name, size_bytes=len(data), sha256=digest))
        piece = checkpoint_pb2.UploadPiece(file_name=name, data=data)
        pieces.append(Part(piece=piece))
    described = {"request_id": os.urandom(8).hex(), "name": "a", "base_model": SERVED_NAME}
    return [
        Part(header=checkpoint_pb2.UploadHeader(files=files, **(described | header))),
        *pieces,
    ]


def sent(services: Services, parts: Iterator[Part] | list[Part]) -> Refusal:
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.UploadCheckpoint(iter(parts), timeout=CALL_LIMIT_S)
    return refusal(caught.value)


def rename(index: int, name: str) -> Callable[[list[Part]], object]:
    def change(parts: list[Part]) -> None:
        parts[0].header.files[index].name = name

    return change


def alter(**fields: Any) -> Callable[[list[Part]], object]:
    """Changes what the header says of the weights."""

    def change(parts: list[Part]) -> None:
        for name, value in fields.items():
            setattr(parts[0].header.files[1], name, value)

    return change


def shift(parts: list[Part]) -> None:
    parts[2].piece.offset_bytes = 5


MALFORMED: dict[str, tuple[Callable[[list[Part]], object], str, str]] = {
    "no_header": (lambda parts: parts.pop(0), "header", "send it first"),
    "two_headers": (lambda parts: parts.append(parts[0]), "piece", "send the header once"),
    "no_id": (
        lambda parts: parts[0].header.ClearField("request_id"),
        "header.request_id",
        "request_id",
    ),
    "no_name": (lambda parts: parts[0].header.ClearField("name"), "header.name", "name"),
    "a_path_for_a_name": (rename(1, "../../x"), "header.files[1].name", "does not belong"),
    "a_pickle": (rename(1, "adapter_model.bin"), "header.files[1].name", "is a pickle"),
    "one_file_twice": (rename(1, CONFIG), "header.files[1]", "names .* twice"),
    "no_weights": (
        lambda parts: parts[0].header.files.pop(),
        "header.files",
        f"lacks `{WEIGHTS}`",
    ),
    "a_huge_file": (
        alter(size_bytes=10**12),
        "header.files[1].size_bytes",
        "what the largest adapter",
    ),
    "no_digest": (alter(sha256="ff"), "header.files[1].sha256", "64 hexadecimal"),
    "another_digest": (alter(sha256="0" * 64), WEIGHTS, "does not match the SHA-256"),
    "fewer_bytes": (lambda parts: parts.pop(), WEIGHTS, "where the header says"),
    "more_bytes": (alter(size_bytes=100), WEIGHTS, "where the header says"),
    "a_gap": (shift, "piece.offset_bytes", "without gaps"),
    "another_file": (
        lambda parts: setattr(parts[1].piece, "file_name", "x"),
        "piece.file_name",
        "does not name",
    ),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_stream(kind: str, services: Services, tmp_path: Path) -> None:
    change, field, words = MALFORMED[kind]
    parts = parts_of(save_adapter(services.model, tmp_path / "theirs"))
    change(parts)

    error = sent(services, parts)

    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert re.search(words, error.message), error.message


@pytest.mark.usefixtures("untouched")
def test_a_caller_that_leaves_half_way(services: Services, tmp_path: Path) -> None:
    parts = parts_of(save_adapter(services.model, tmp_path / "theirs"))

    def leave() -> Iterator[Part]:
        yield from parts[:2]
        call.cancel()
        yield parts[2]

    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        call = stub.UploadCheckpoint.future(leave(), timeout=CALL_LIMIT_S)
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result()


def test_an_upload_sent_twice_is_there_once(services: Services, tmp_path: Path) -> None:
    parts = parts_of(save_adapter(services.model, tmp_path / "theirs"))
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        first, second = (
            stub.UploadCheckpoint(iter(parts), timeout=CALL_LIMIT_S).checkpoint for _ in range(2)
        )
        parts[0].header.metadata["a"] = "b"
        with pytest.raises(grpc.RpcError) as caught:
            stub.UploadCheckpoint(iter(parts), timeout=CALL_LIMIT_S)

    assert first == second
    assert first.revision_path.endswith("@1")
    assert refusal(caught.value).code == grpc.StatusCode.ALREADY_EXISTS
