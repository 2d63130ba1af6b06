"""Files of strangers: whatever is in them, they are read or refused by name."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoint_store.foreign.config import read_config
from checkpoint_store.foreign.tensor_file import TensorFile
from mint_core.errors import InvalidRequest

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "a.safetensors"
    generator = np.random.default_rng(0)
    arrays = {
        f"{name}.{dtype}": generator.standard_normal((3, 4)).astype(dtype)
        for name in "ab"
        for dtype in ("float64", "float32", "float16")
    }
    save_file(arrays, file, {"note": "here"})
    return file


def test_every_type_of_float_is_read_as_float32(written: Path) -> None:
    from safetensors.numpy import load_file

    file = TensorFile(written, "a")

    arrays = load_file(written)
    assert file.tensors.keys() == arrays.keys()
    assert file.metadata == {"note": "here"}
    for name, array in arrays.items():
        assert np.array_equal(file.float32(name), array.astype(np.float32))
        assert np.array_equal(file.float32(name, slice(1, 3)), array[1:3].astype(np.float32))


def test_bfloat16_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensor = torch.randn(5, 3).to(torch.bfloat16)
    save_file({"a": tensor}, tmp_path / "a")
    assert np.array_equal(TensorFile(tmp_path / "a", "a").float32("a"), tensor.float().numpy())


@settings(max_examples=300)
@given(data=st.data())
def test_no_damage_is_more_than_a_refusal(data: st.DataObject, written: Path) -> None:
    content = bytearray(written.read_bytes())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    damaged = written.with_name("damaged")
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])

    with contextlib.suppress(InvalidRequest):
        file = TensorFile(damaged, "damaged")
        for name, entry in file.tensors.items():
            assert file.float32(name).shape == entry.shape


def header(**tensors: Any) -> bytes:
    encoded = json.dumps(tensors).encode()
    return len(encoded).to_bytes(8, "little") + encoded


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header too small"),
        (header(a=F4) + b"123", "not fully covered"),
        # They overlap; which of them is named follows the library's hashes, which are drawn anew.
        (header(a=F4, b=F4) + b"1234", "invalid offset for tensor `[ab]`"),
        (header(a=F4 | {"shape": [2]}) + b"1234", "invalid shape"),
        (header(a=F4 | {"data_offsets": [4, 8]}) + b"12345678", "invalid offset for tensor `a`"),
        (header(a=F4 | {"data_offsets": [4, 0]}) + b"1234", "invalid offset for tensor `a`"),
        (header(a=F4 | {"shape": [-1]}) + b"1234", "integer `-1`"),
        (header(a=F4 | {"shape": [True]}) + b"1234", "boolean `true`"),
        (header(a=F4 | {"dtype": "F99"}) + b"1234", "`F99`"),
        (header(__metadata__={"a": 1}) + b"", "expected a string"),
        (header(a=F4) + b"12345", "not fully covered"),
        ((2**62).to_bytes(8, "little") + b"{}", "header too large"),
        ((4).to_bytes(8, "little") + b"null", "invalid type: null"),
        (b"PK\x03\x04" + b"0" * 20, "is a pickle"),
    ],
)
def test_files_that_are_no_safetensors(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidRequest, match=words) as caught:
        TensorFile(tmp_path / "file", "its-name")
    assert caught.value.field == "its-name"


def test_of_a_name_twice_the_last_counts_and_the_rest_is_a_hole(tmp_path: Path) -> None:
    entries = json.dumps(F4), json.dumps(F4 | {"data_offsets": [4, 8]})
    encoded = f'{{"a": {entries[0]}, "a": {entries[1]}}}'.encode()
    (tmp_path / "file").write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"12345678")
    with pytest.raises(InvalidRequest, match="invalid offset for tensor `a`"):
        TensorFile(tmp_path / "file", "a")


@given(st.dictionaries(st.sampled_from([*PLAIN, "use_rslora", "bias", "new"]), JSON))
def test_no_configuration_crashes(changes: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        read_config(json.dumps(PLAIN | changes).encode())


@given(st.binary(max_size=50))
def test_no_bytes_crash(encoded: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_config(encoded)


def test_a_plain_configuration() -> None:
    config = read_config(json.dumps(PLAIN | {"bias": "none", "lora_dropout": 0.1}).encode())
    assert (config.rank, config.alpha, config.use_rslora) == (8, 16.0, False)
    assert (config.target_modules, config.partial) == (("q_proj",), False)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": True}, "r"),
        ({"r": "8"}, "r"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e39}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["a"]}, "target_parameters"),
    ],
)
def test_what_is_not_followed_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_config(json.dumps(PLAIN | changes).encode())
    assert caught.value.field == f"adapter_config.json.{field}"
