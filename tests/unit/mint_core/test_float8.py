"""Float8 weights: which checkpoints are read, what they take, whose adapters open."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint_core.errors import FailedPrecondition
from mint_core.model import base_files
from mint_core.model.base_files import check_memory, needed_bytes
from mint_core.model.float8.stored import Stored, stored
from tests.families import named
from tests.float8_folders import WEIGHTS, by_channel, compressed, in_blocks, say
from tests.models import load_base
from tests.unit.trainer_service.models import MODEL

FINE = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def said(quantization: object) -> Any:
    config = SimpleNamespace(quantization_config=quantization)
    config.get_text_config = lambda: config
    return config


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"`quant_method` 'gptq', and fp8 and compressed"),
        ({**FINE, "fmt": "e5m2"}, "`fmt` 'e5m2', and e4m3 is read"),
        ({**FINE, "weight_block_size": [128, 96]}, r"`weight_block_size` \[128, 96\], and two"),
        ({**FINE, "weight_block_size": 128}, "`weight_block_size` 128"),
        ({**FINE, "modules_to_convert": ["embed_tokens"]}, r"`modules_to_convert` \['embed"),
        (compressed(type="int"), r"`config_groups.group_0.weights.type` 'int', and float is"),
        (compressed(num_bits=4), r"`config_groups.group_0.weights.num_bits` 4, and 8 is"),
        (compressed(symmetric=False), "weights.symmetric` False"),
        (compressed(strategy="group"), "`config_groups.group_0.weights.strategy` 'group'"),
        (compressed(group_size=128), "weights.group_size` 128, which is not known"),
        ({**compressed(), "format": "pack-quantized"}, "`format` 'pack-quantized'"),
        ({**compressed(), "transform_config": {"r": 1}}, "`transform_config`"),
        ({**compressed(), "kv_cache_scheme": {"num_bits": 8}}, "`kv_cache_scheme`"),
        ({**compressed(), "config_groups": {}}, "`config_groups` '0 kinds of weights'"),
    ],
)
def test_weights_that_are_not_understood_are_refused_by_name(
    quantization: dict[str, Any], words: str
) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        stored(said(quantization))
    assert "give another dtype, or the model as it was before" in caught.value.message


def test_what_is_understood_says_where_the_scales_are() -> None:
    assert stored(said(None)) is None
    assert stored(said(FINE)) == Stored("weight_scale_inv", (128, 128))
    assert stored(said({"quant_method": "fp8"})) == Stored("weight_scale_inv")
    assert stored(said(compressed())) == Stored("weight_scale")
    blocks = compressed(strategy="block", block_structure=[128, 64])
    assert stored(said(blocks)) == Stored("weight_scale", (128, 64))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_each_channel_has_a_scale_or_all_have_one(shape: tuple[int, ...]) -> None:
    numbers = torch.ones(6, 10).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7.0).expand(6)[: 6 if 6 in shape else 1].reshape(shape)
    made = Stored("weight_scale").matrix(numbers, scales)
    assert torch.equal(made.weight(torch.float32), scales.reshape(-1, 1).expand(6, 10))


def test_blocks_may_end_beyond_the_weight() -> None:
    numbers = torch.ones(5, 9).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7.0).view(2, 3)
    made = Stored("weight_scale_inv", (3, 4)).matrix(numbers, scales)
    wide = scales.repeat_interleave(3, 0)[:5].repeat_interleave(4, 1)[:, :9]
    assert torch.equal(made.weight(torch.float32), wide)
    with pytest.raises(ValueError, match=r"\[2, 2\] `weight_scale_inv` of float32 for a weight"):
        Stored("weight_scale_inv", (3, 4)).matrix(numbers, scales[:, :2])


def damaged(folder: Path, to: Path, name: str, change: Any) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / WEIGHTS)
    if (tensor := change(tensors.pop(name))) is not None:
        tensors[name] = tensor
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    return to


def test_scales_that_do_not_fit_are_told_by_name(qwen3_folder: Path, tmp_path: Path) -> None:
    model = in_blocks(qwen3_folder, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    for number, (change, words) in enumerate(
        (
            (lambda scales: None, "`weight` and `weight_scale_inv` go together"),
            (lambda scales: scales[:2].clone(), r"\[2, 2\] `weight_scale_inv`"),
            (lambda scales: scales.to(torch.int32), "of int32 for a weight"),
        )
    ):
        broken = damaged(model, tmp_path / str(number), f"{name}_scale_inv", change)
        with pytest.raises(FailedPrecondition, match=f"as float8: {name}: .*{words}"):
            load_base(broken, device="cpu", dtype="float8")


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    folder = named("Qwen 3 MoE").make(tmp_path / "model")
    with pytest.raises(FailedPrecondition, match=r"Qwen3MoeForCausalLM .* experts' weights cannot"):
        load_base(folder, device="cpu", dtype="float8")


def test_a_base_has_a_fingerprint_of_its_own_and_knows_its_others(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    """On disk or made here, of whatever type the rest is."""
    found = set()
    for folder in (qwen3_folder, in_blocks(qwen3_folder, tmp_path / "blocks")):
        plain = load_base(folder, device="cpu").description
        float8 = load_base(folder, device="cpu", dtype="float8").description
        assert (float8.dtype, plain.dtype) == ("float8", "float32")
        assert float8.other_fingerprint == plain.fingerprint
        assert plain.other_fingerprint == float8.fingerprint
        found |= {plain.fingerprint, float8.fingerprint}
    assert len(found) == 4


def test_weights_of_the_body_are_rounded_and_no_others(qwen3_folder: Path, tmp_path: Path) -> None:
    plain = dict(load_base(qwen3_folder, device="cpu").model.named_parameters())
    for folder in (qwen3_folder, by_channel(qwen3_folder, tmp_path / "channels")):
        model = load_base(folder, device="cpu", dtype="float8").model
        own = dict(model.named_parameters())
        assert own.keys() == plain.keys()
        same = {name for name, weight in own.items() if torch.equal(weight, plain[name])}
        layers = {name for name in own if "_proj" in name}
        left = {"model.layers.0.mlp.down_proj.weight"} if folder != qwen3_folder else set()
        assert same == own.keys() - layers | left
        assert not hasattr(model.config, "quantization_config")


def test_memory_is_counted_in_the_type_that_is_served(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = needed_bytes(qwen3_folder, torch.bfloat16)
    least = needed_bytes(qwen3_folder, torch.bfloat16, float8=True)
    # Two layers: q, k, v and o, gate and up and down; and a scale of 4 bytes for each output.
    body = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    scales = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert least == half - body + 4 * scales

    monkeypatch.setattr(base_files, "free_bytes", lambda device, share=0.0: least)
    gpu = torch.device("cuda", 0)
    with pytest.raises(FailedPrecondition, match="give --dtype float8, in which it needs"):
        check_memory(qwen3_folder, gpu, torch.bfloat16)
    check_memory(qwen3_folder, gpu, torch.bfloat16, float8=True)


def test_adapters_of_the_other_kind_open_only_when_told_to() -> None:
    plain = replace(MODEL, fingerprint="a", other_fingerprint="b", dtype="float32")
    float8 = replace(MODEL, fingerprint="b", other_fingerprint="a", dtype="float8")
    for model, other, kind in ((plain, float8, "with"), (float8, plain, "without")):
        told = replace(model, adapters_across_dtypes=True)
        assert (model.opens(model.fingerprint), model.opens(other.fingerprint)) == (True, False)
        assert (told.opens(other.fingerprint), told.opens("c")) == (True, False)
        remedy = model.remedy(other.fingerprint, "go elsewhere")
        assert remedy.startswith(f"that is this model {kind} float8 weights; go elsewhere, or ")
        assert "--adapters-across-dtypes" in remedy
        assert model.remedy("c", "go elsewhere") == "go elsewhere"


def test_another_dtype_reads_what_the_numbers_stand_for(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = in_blocks(qwen3_folder, tmp_path / "model")
    plain = load_base(folder, device="cpu", dtype="float32").model.state_dict()
    float8 = load_base(folder, device="cpu", dtype="float8").model.state_dict()
    assert all(torch.equal(weight, float8[name]) for name, weight in plain.items())


def test_other_quantized_checkpoints_are_refused_with_float8_alone(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    say(folder, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(FailedPrecondition, match="`quant_method` 'gptq'"):
        load_base(folder, device="cpu", dtype="float8")
