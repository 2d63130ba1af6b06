"""A published folder is a PEFT adapter: it opens as it lies and computes what its arrays say."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoint_store import CheckpointStore
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name
from tests.models import tiny_llama, tiny_qwen3
from tests.unit.checkpoint_store.conftest import Publish

MAKERS = {"qwen3": tiny_qwen3, "llama": tiny_llama}
TOKENS = torch.arange(3, 15).unsqueeze(0)  # [1, 12]


@dataclass(frozen=True, slots=True)
class Case:
    architecture: str
    tied: bool
    targets: tuple[str, ...]  # a module is trained if its name has one of them
    alpha: float = 32.0
    use_rslora: bool = False


CASES = [
    Case("qwen3", tied=True, targets=("self_attn", "mlp", "lm_head")),
    Case("qwen3", tied=False, targets=("self_attn", "mlp", "lm_head")),
    Case("llama", tied=True, targets=("lm_head",)),
    Case("llama", tied=False, targets=("lm_head",), alpha=7.5),
    Case("llama", tied=False, targets=("self_attn",), use_rslora=True),
    Case("qwen3", tied=True, targets=("mlp",), alpha=7.5, use_rslora=True),
    Case("qwen3", tied=True, targets=("layers.1.self_attn.q_proj",)),
]


# peft says that an adapter on a tied head is not on the embedding: as it should be.
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_published_adapter_opens_in_peft_with_the_same_logits(
    store: CheckpointStore, publish: Publish, tmp_path: Path, case: Case
) -> None:
    folder = MAKERS[case.architecture](tmp_path / "base", tied=case.tied)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spec, weights = _adapter(base, case)
    with torch.no_grad(), _hooked(base, spec, weights):
        expected = base(TOKENS).logits
    plain = base(TOKENS).logits.detach()
    published = store.open(publish(spec=spec, weights=weights, base_model="tiny"), tenant="t")

    model = PeftModel.from_pretrained(base, str(published.folder)).eval()

    with torch.no_grad():
        found = model(TOKENS).logits
    assert (expected - plain).norm() > 0.1 * plain.norm()  # the adapter is felt
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_adapter_config_says_what_was_trained(store: CheckpointStore, publish: Publish) -> None:
    opened = store.open(publish(), tenant="t")

    config = json.loads((opened.folder / "adapter_config.json").read_text())

    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "tiny"
    assert config["bias"] == "none"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 32, False)
    assert config["target_modules"] == list(opened.manifest.spec.modules)


def _adapter(base: PreTrainedModel, case: Case) -> tuple[AdapterSpec, AdapterArrays]:
    linear = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    modules = tuple(sorted(n for n in linear if any(target in n for target in case.targets)))
    spec = AdapterSpec(
        rank=4, alpha=case.alpha, use_rslora=case.use_rslora, seed=0, modules=modules
    )
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.1, shape).astype(np.float32)

    weights = {}
    for name in modules:
        weights[lora_a_name(name)] = draw(spec.rank, linear[name].in_features)
        weights[lora_b_name(name)] = draw(linear[name].out_features, spec.rank)
    return spec, weights


@contextmanager
def _hooked(base: PreTrainedModel, spec: AdapterSpec, weights: AdapterArrays) -> Iterator[None]:
    """The slow, obvious adapter: each trained layer's output plus `scale * B A x`."""
    handles = []
    for name in spec.modules:
        a = torch.from_numpy(weights[lora_a_name(name)])  # [rank, in]
        b = torch.from_numpy(weights[lora_b_name(name)])  # [out, rank]

        def add(_module, inputs, output, a=a, b=b):  # type: ignore[no-untyped-def]
            return output + spec.scale * (inputs[0] @ a.T @ b.T)

        handles.append(base.get_submodule(name).register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()
