"""Tokenizer files: fetched once, checked, kept by content, opened without a hub."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mint
from mint import recipe
from mint._files.tokenizer_files import cache_folder
from mintrpc.v1 import model_pb2
from tests.unit.mint.faulty_server import Server, running

PIECE_BYTES = 1000


def pieces(folder: Path) -> Iterator[model_pb2.GetTokenizerResponse]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (folder / name).read_bytes()
        for offset in range(0, len(data), PIECE_BYTES):
            yield model_pb2.GetTokenizerResponse(
                name=name,
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                offset_bytes=offset,
                data=data[offset : offset + PIECE_BYTES],
            )


@pytest.fixture
def server(qwen3_folder: Path) -> Iterator[Server]:
    with running(tokenizer=list(pieces(qwen3_folder))) as one:
        yield one


def tokenizer(server: Server) -> Any:
    with mint.ServiceClient(base_url=server.address) as service:
        return service.create_lora_training_client().get_tokenizer()


def test_it_encodes_decodes_and_renders_without_a_hub(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = tokenizer(server)
    ids = one.encode("Question: What is 3 * 4?", add_special_tokens=True)

    assert one.decode(ids) == "Question: What is 3 * 4?"
    assert one.eos_token_id == 2
    chat = one.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_by_name_it_is_the_servers_before_a_hub_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_BASE_URL", server.address)

    assert recipe.get_tokenizer("base").encode("one two", add_special_tokens=False)
    assert server.model.tokenizer_calls == 1


@pytest.mark.parametrize("served", [True, False])
def test_a_name_that_nobody_knows_is_refused_with_all_that_was_tried(
    server: Server, monkeypatch: pytest.MonkeyPatch, served: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("mint._files.tokenizer_files._SERVER_S", 0.5)
    monkeypatch.setenv("MINT_BASE_URL", server.address if served else "127.0.0.1:9")
    why = "which serves base" if served else "no server answered at `127.0.0.1:9`"

    with pytest.raises(mint.InvalidInputError, match=f"`name` is 'some/model'.*{why}.*no hub"):
        recipe.get_tokenizer("some/model")


WITHOUT_TORCH = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
from mint import recipe
recipe.get_tokenizer(sys.argv[1])
assert "torch" not in sys.modules
"""


def test_a_client_without_torch_is_not_told_of_it(qwen3_folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(qwen3_folder)]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("", "")


def test_a_server_that_makes_no_tokens_of_texts_is_named(
    server: Server, training: mint.TrainingClient, sampling: mint.SamplingClient
) -> None:
    for client in (training, sampling):
        with pytest.raises(mint.InvalidInputError, match="`on_server` needs the feature `texts`"):
            client.get_tokenizer(on_server=True)
    with pytest.raises(mint.InvalidInputError, match="`on_server` is 1; give True or False"):
        training.get_tokenizer(on_server=1)  # type: ignore[arg-type]
    assert server.model.tokenizer_calls == 0


def test_files_are_fetched_once_and_opened_once(server: Server) -> None:
    with mint.ServiceClient(base_url=server.address) as service:
        training = service.create_lora_training_client()
        sampling = service.create_sampling_client()
        assert training.get_tokenizer() is sampling.get_tokenizer()
    tokenizer(server)

    assert server.model.tokenizer_calls == 1


def test_a_broken_connection_is_made_again(server: Server) -> None:
    server.model.broken_calls = 2

    assert tokenizer(server).encode("one two")
    assert server.model.tokenizer_calls == 3


def test_a_damaged_cache_is_fetched_again(server: Server) -> None:
    tokenizer(server)
    (cache_folder() / server.model.fingerprint / "tokenizer.json").write_text("{}")

    assert tokenizer(server).encode("one two")
    assert server.model.tokenizer_calls == 2


def damage(piece: model_pb2.GetTokenizerResponse, how: str) -> None:
    match how:
        case "sha256":
            piece.sha256 = "0" * 64
        case "name":
            piece.name = "../evil.json"
        case "offset":
            piece.offset_bytes = 5
        case "size":
            piece.size_bytes += 1


@pytest.mark.parametrize(
    ("how", "message"),
    [("sha256", "damaged"), ("name", "evil"), ("offset", "missing"), ("size", "incomplete")],
)
def test_files_that_do_not_check_out_are_refused_and_not_kept(
    server: Server, how: str, message: str
) -> None:
    damage(server.model.tokenizer[-1], how)

    with pytest.raises(mint.APIResponseValidationError, match=message):
        tokenizer(server)
    assert list(cache_folder().iterdir()) == []


def test_a_fingerprint_that_is_no_digest_is_refused(server: Server) -> None:
    server.model.fingerprint = "../../elsewhere"

    with pytest.raises(mint.APIResponseValidationError, match="digest"):
        tokenizer(server)
