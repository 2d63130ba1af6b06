"""Base models that cannot be served, and devices that are not there."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from mint_core.errors import FailedPrecondition
from mint_core.model.architecture import check_layers, check_windows, context_length, text_part
from mint_core.model.proof import PROBE_TOKENS
from tests.models import load_base


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def add_weights(folder: Path, *names: str, shape: tuple[int, ...] = (64,)) -> None:
    arrays = load_file(folder / "model.safetensors")
    arrays |= {name: np.ones(shape, np.float32) for name in names}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def weights_without_a_place(folder: Path) -> None:
    add_weights(folder, "model.layers.0.self_attn.q_proj.bias")


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))


def lacking_weights(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.norm.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


def pickled_weights(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def add_code(folder: Path, file: str, **changes: object) -> None:
    """Code that ends the test if it is run."""
    (folder / "own.py").write_text("raise KeyboardInterrupt('code of a folder runs')\n")
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, **changes}))


def code_of_its_own(folder: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    add_code(folder, "config.json", model_type="unheard_of", auto_map=classes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_tokenizer, r"it has no tokenizer, which is one of tokenizer\.json"),
        (without_weights, r"no file named model\.safetensors"),
        (torn_weights, r"(incomplete|header|deserializ)"),
        (lacking_weights, r"its weights lack model\.norm\.weight and 0 other tensors"),
        (more_layers, r"its weights lack model\.layers\.2\.input_layernorm\.weight and 10 other"),
        (
            fewer_layers,
            r"config.json has no place for model\.layers\.1\.input_\w+\.weight and 10 ot",
        ),
        (
            weights_without_a_place,
            r"no place for model\.layers\.0\.self_attn\.q_proj\.bias and 0 oth",
        ),
        (broken_config, r"JSON|property name"),
        (unknown_architecture, "`unheard_of`"),
        (pickled_weights, r"no file named model\.safetensors"),
        (code_of_its_own, "custom code"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_reason(
    qwen3_folder: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(FailedPrecondition, match=words) as caught:
        load_base(str(folder))

    assert f"the base model '{folder}' cannot be loaded: " in caught.value.message
    assert "\n" not in caught.value.message


def test_code_beside_a_model_that_is_known_is_left_alone(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    add_code(folder, "config.json", auto_map=classes)
    tokenizers = {"AutoTokenizer": ["own.Tokenizer", None]}
    add_code(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map=tokenizers)

    base = load_base(str(folder), device="cpu")

    assert type(base.model).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "is not supported; give cpu, cuda, cuda:N or auto"),
        ("cuda:x", "is not supported"),
        (f"cuda:{torch.cuda.device_count()}", "is not there: torch .* sees [0-9]+ CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(qwen3_folder: Path, device: str, words: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"`device` '{device}' {words}"):
        load_base(str(qwen3_folder), device=device)


def test_weights_that_are_no_part_of_the_model_are_left_out(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    """A tied head that is stored too, buffers of older versions, heads beside the model."""
    folder = Path(shutil.copytree(qwen3_folder, tmp_path / "model"))
    arrays = load_file(folder / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    inverse = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    add_weights(folder, "v_head.summary.weight", "mtp.layers.0.mlp.up_proj.weight", *inverse)

    base = load_base(str(folder), device="cpu")

    assert base.description.fingerprint == load_base(str(qwen3_folder)).description.fingerprint


def test_a_layer_that_remembers_what_no_cache_keeps_is_refused(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It mixes each token's state with that of the token before, in each document alone."""
    own = Qwen3MLP.forward

    def mixing(module: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])[:, None] % PROBE_TOKENS
        return own(module, x + 0.5 * x.roll(1, dims=1) * (at > 0))

    monkeypatch.setattr(Qwen3MLP, "forward", mixing)
    with pytest.raises(FailedPrecondition, match=r"Qwen3ForCausalLM .* decoded logits differ"):
        load_base(str(qwen3_folder), device="cpu")


def test_documents_that_touch_are_refused(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's state is blended with that of a token of the other document."""
    own = Qwen3MLP.forward

    def blending(module: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        return own(module, (x + x.roll(PROBE_TOKENS, dims=1)) / 2)

    monkeypatch.setattr(Qwen3MLP, "forward", blending)
    with pytest.raises(FailedPrecondition, match=r"Qwen3ForCausalLM .* packed logits differ"):
        load_base(str(qwen3_folder), device="cpu")


def test_a_layer_that_reads_other_rows_than_the_tokens_is_refused(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts of their own do; their adapters would be applied to the rows of others."""
    own = Qwen3MLP.forward

    def in_parts(module: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([own(module, part) for part in x.split(20, dim=1)], dim=1)

    monkeypatch.setattr(Qwen3MLP, "forward", in_parts)
    words = r"Qwen3ForCausalLM .* `model.layers.0.mlp.gate_proj` reads 40 rows for 48 tokens"
    with pytest.raises(FailedPrecondition, match=words):
        load_base(str(qwen3_folder), device="cpu")


def test_a_model_whose_bits_depend_on_neighbours_says_so(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Qwen3MLP.forward

    def rounding(module: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        return own(module, x) * (1.0 + 1e-5 * (x.shape[1] > 20))

    assert load_base(str(qwen3_folder), device="cpu").description.bitwise_reproducible
    monkeypatch.setattr(Qwen3MLP, "forward", rounding)
    description = load_base(str(qwen3_folder), device="cpu").description
    assert not description.bitwise_reproducible


def test_what_a_short_probe_may_not_meet_is_seen(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates so far open that vectors round hardly one of them otherwise."""
    own = Qwen3MLP.forward

    def gated(module: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        gates = (8.0 + x[..., :4]).sigmoid()  # [1, tokens, 4]
        return own(module, x) * gates.mean(-1, keepdim=True)

    monkeypatch.setattr(Qwen3MLP, "forward", gated)
    for inference in (False, True):
        base = load_base(str(qwen3_folder), device="cpu", inference=inference)
        assert not base.description.bitwise_reproducible


def model_with(**config: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    model.config.get_text_config = lambda: model.config  # type: ignore[union-attr, operator]
    return model


def test_a_model_without_a_part_for_text_alone_is_refused() -> None:
    model = model_with()
    model.config.get_text_config = lambda: SimpleNamespace()  # type: ignore[union-attr, operator]
    model.get_decoder = lambda: torch.nn.Module()  # type: ignore[assignment]
    with pytest.raises(FailedPrecondition, match="no part of it makes hidden states of tokens"):
        text_part(model)


def test_a_configuration_that_names_no_length_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="does not say how long a sequence may be"):
        context_length(model_with())


def test_a_layer_that_the_registry_does_not_see_once_is_refused() -> None:
    model = model_with(num_hidden_layers=2)
    check_layers(model, Counter([0, 1]))
    for seen, words in (([0], "0 times as layer 1"), ([0, 1, 1, 0, 1], "2 times as layer 0")):
        with pytest.raises(FailedPrecondition, match=f"its attention runs {words} in a pass over"):
            check_layers(model, Counter(seen))
    with pytest.raises(FailedPrecondition, match="1 times as layer 2 in a pass over 2 layers"):
        check_layers(model, Counter([0, 1, 2]))


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    """It would show beyond the window alone, which a probe does not reach."""
    mixed = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    check_windows(model_with(**mixed), {0: 64, 1: None})
    check_windows(model_with(sliding_window=64), {0: 64, 1: 64})
    check_windows(model_with(sliding_window=64, use_sliding_window=False), {0: None, 1: None})
    with pytest.raises(FailedPrecondition, match=r"windows \[None\] but .* names \[64, None\]"):
        check_windows(model_with(**mixed), {0: None, 1: None})


def test_rotary_frequencies_that_a_long_neighbour_would_change_bound_the_context() -> None:
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    model = model_with(max_position_embeddings=131_072, rope_parameters=longrope)
    assert context_length(model) == 4096
    by_layer = {"sliding_attention": {"rope_type": "default"}, "full_attention": longrope}
    model = model_with(max_position_embeddings=131_072, rope_parameters=by_layer)
    assert context_length(model) == 4096
    assert context_length(model_with(max_position_embeddings=131_072)) == 131_072
