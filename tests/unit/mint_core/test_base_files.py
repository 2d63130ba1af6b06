"""Base models from a hub and its local cache, in shards, and those that do not fit."""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from mint_core.errors import FailedPrecondition
from mint_core.model.base_files import check_memory, free_bytes, needed_bytes, weight_files
from tests.hub import MODEL, Hub, serving
from tests.models import load_base, write_tokenizer
from tests.warm import started

HUB = huggingface_hub.constants


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What HF_HOME and HF_HUB_OFFLINE set when a process starts."""
    monkeypatch.setattr(HUB, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(
    qwen3_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    with serving(Hub(folder)) as hub:
        monkeypatch.setattr(HUB, "ENDPOINT", hub.address)
        resolve = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(HUB, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", False)
        yield hub


def cached(cache: Path, folder: Path, revision: str = "main") -> Path:
    """A model as the hub's client leaves it in its cache. Returns the snapshot's folder."""
    commit = "0123456789" * 4
    place = cache / f"models--{MODEL.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


def test_a_cached_model_is_served_offline(qwen3_folder: Path, cache: Path) -> None:
    snapshot = cached(cache, qwen3_folder)
    description = load_base(MODEL, device="cpu").description

    assert description.name == MODEL
    assert description.folder == str(snapshot)
    assert description.fingerprint == load_base(qwen3_folder, device="cpu").description.fingerprint


def test_a_revision_is_its_own_snapshot(qwen3_folder: Path, cache: Path) -> None:
    snapshot = cached(cache, qwen3_folder, revision="v2")
    base = load_base(MODEL, device="cpu", base_model_revision="v2")

    assert base.description.folder == str(snapshot)
    with pytest.raises(FailedPrecondition, match=r"HF_HUB_OFFLINE is set, and .* lacks"):
        load_base(MODEL, device="cpu")


def test_a_folder_has_no_revisions(qwen3_folder: Path) -> None:
    with pytest.raises(FailedPrecondition, match="`base_model_revision` is 'v2', but `base_model`"):
        load_base(qwen3_folder, base_model_revision="v2")


def test_a_revision_comes_from_the_hub_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.revision = "v2"
    (hub.folder / "consolidated.safetensors").write_bytes(b"the same, for others")
    monkeypatch.setenv("HF_TOKEN", "hf_a_token")
    caplog.set_level(logging.INFO)
    first = load_base(MODEL, device="cpu", base_model_revision="v2").description
    assert hub.tokens == {"Bearer hf_a_token"}
    assert "model.safetensors" in hub.fetched
    assert "consolidated.safetensors" not in hub.fetched
    assert any("GiB" in record.message for record in caplog.records)

    hub.fetched.clear()
    again = load_base(MODEL, device="cpu", base_model_revision="v2").description
    assert again == first
    assert not hub.fetched
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", True)
    assert load_base(MODEL, device="cpu", base_model_revision="v2").description == first


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((404, "RepoNotFound"), "there is none, or a private one; .* a token in HF_TOKEN"),
        ((403, "GatedRepo"), "it is gated; accept its terms there, and give .* in HF_TOKEN"),
        ((404, "RevisionNotFound"), "no such revision; check `base_model_revision`"),
    ],
)
def test_what_the_hub_refuses_is_told_by_name(
    hub: Hub, refusal: tuple[int, str], words: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(FailedPrecondition, match=words) as caught:
        load_base(MODEL, base_model_revision="v2")
    named = f"the base model '{MODEL}' of revision 'v2' is neither a folder here nor to be had from"
    assert caught.value.message.startswith(f"{named} the hub {hub.address}: ")
    assert "\n" not in caught.value.message


def test_a_hub_that_is_not_reached_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HUB, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FailedPrecondition, match=r"that is not reached, and the cache .* lacks"):
        load_base(MODEL)


def test_what_is_no_name_is_told(cache: Path) -> None:
    with pytest.raises(FailedPrecondition, match="its models are named OWNER/NAME; give such a"):
        load_base("no folder, no name")


def sharded(folder: Path, experts: int = 0) -> Path:
    """A model of 6 layers of 13 MB each, in shards of 8 MB, where each expert has tensors of its
    own, as in published ones.
    """
    sizes = {
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    if experts:
        of_experts = {"num_experts": experts, "moe_intermediate_size": 1408 // experts}
        config = Qwen3MoeConfig(**sizes, **of_experts, num_experts_per_tok=2)
    else:
        config = Qwen3Config(**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder, max_shard_size="8MB"
    )
    write_tokenizer(folder)
    return folder


LAYER_BYTES, SHARD_BYTES = 13_000_000, 8_000_000


def own_bytes(pid: int) -> int:
    """Memory of a process beside pages of files that it has mapped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.parametrize(("dtype", "experts"), [("bfloat16", 0), ("bfloat16", 8), ("float8", 0)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_shards_take_little_more_memory_than_the_model(
    device: str, dtype: str, experts: int, qwen3_folder: Path, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "sharded", experts)
    assert len(weight_files(folder)) > 5
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert any(".experts.7.down_proj." in name for name in index["weight_map"]) == bool(experts)
    needed = needed_bytes(folder, torch.bfloat16, float8=dtype == "float8")
    model_bytes = needed if device == "cpu" else 0
    words = ["tests.reading", str(qwen3_folder), str(folder), device, dtype]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with started([sys.executable, "-m", *words], **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = peak = own_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        with suppress(IndexError, OSError):  # it has ended
            while True:
                peak = max(peak, own_bytes(child.pid))
                time.sleep(0.0005)
        assert child.stdout.read() == "done\n"
    assert peak - before <= model_bytes + SHARD_BYTES + LAYER_BYTES


def test_progress_is_told_in_the_log_and_to_whoever_waits(
    qwen3_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mint_core.hosting.service_config import ServiceConfig
    from mint_core.model import loading

    beats: list[None] = []
    caplog.set_level(logging.INFO)
    config = ServiceConfig(base_model=str(qwen3_folder), device="cpu")
    loading.load_base(config, progress=lambda: beats.append(None))

    weights = len(load_base(qwen3_folder, device="cpu").description.linear_modules)
    told = [r.message for r in caplog.records if r.message.startswith("Loading weights: ")]
    assert told
    done, of, total = told[0].removeprefix("Loading weights: ").split()
    assert (done, of) == (total, "of")
    assert int(total) > weights
    assert beats


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    whole = needed_bytes(folder, None)
    shutil.copy(weight_files(folder)[0], folder / "consolidated.safetensors")
    assert needed_bytes(folder, None) == whole
    gone = weight_files(folder)[1]
    gone.unlink()
    with pytest.raises(
        FailedPrecondition, match=f"its index names {gone.name} and 0 other files that are not"
    ):
        load_base(folder, device="cpu")


def hollow(folder: Path, dtype: str, parameters: int) -> Path:
    """A model of one tensor, whose bytes are a hole in a file."""
    size = parameters * (4 if dtype == "F32" else 2)
    tensor = {"dtype": dtype, "shape": [parameters], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


def test_what_a_model_needs_is_counted_in_the_type_that_is_served(tmp_path: Path) -> None:
    hollow(tmp_path, "F32", 1 << 20)
    assert needed_bytes(tmp_path, None) == needed_bytes(tmp_path, torch.float32) == 4 << 20
    assert needed_bytes(tmp_path, torch.bfloat16) == 2 << 20
    hollow(tmp_path, "BF16", 1 << 20)
    assert needed_bytes(tmp_path, torch.float32) == 4 << 20


def test_what_would_fit_is_told(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    hollow(tmp_path, "F32", int(free * 0.4))
    with pytest.raises(FailedPrecondition, match="give --dtype bfloat16, in which it needs"):
        check_memory(tmp_path, torch.device("cpu"), torch.float32)
    check_memory(tmp_path, torch.device("cpu"), torch.bfloat16)


def test_a_share_of_memory_is_all_that_a_process_takes(tmp_path: Path) -> None:
    cpu, memory = torch.device("cpu"), psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    assert free_bytes(cpu, 1e-9) == 0
    share = (own + 2**28) / memory.total
    assert free_bytes(cpu, share) == pytest.approx(2**28, abs=2**26)
    assert free_bytes(cpu, 1.0) <= psutil.virtual_memory().available + 2**26
    hollow(tmp_path, "F32", 2**28)
    with pytest.raises(FailedPrecondition, match=r"its share on cpu.*give a larger --memory-share"):
        check_memory(tmp_path, cpu, None, share)


def test_too_little_memory_is_refused_before_anything_is_loaded(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    folder = hollow(Path(shutil.copytree(qwen3_folder, tmp_path / "model")), "F32", 1 << 41)
    words = (
        r"needs 8192\.0 GiB but (\S+) GiB are free on cpu, (\S+) GiB too few; free \2 GiB, or "
        r"serve a smaller model, of up to \S+e9 parameters$"
    )
    with pytest.raises(FailedPrecondition, match=words):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{]"])
def test_a_torn_header_is_told(qwen3_folder: Path, tmp_path: Path, start: bytes) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(start)
    with pytest.raises(FailedPrecondition, match="cannot be loaded: ") as caught:
        load_base(folder, device="cpu")
    assert "\n" not in caught.value.message
