"""What do layers with experts, and layers with states, cost? A step of training against the loop
that a user would write with PEFT and transformers, and decoding with 8 adapters against none.
Random models of 8 layers and width 512; rank 16 on all linear layers and the head, one thread.

`python -m benchmarks.hybrids MODEL PART` measures a part, each in less than 8 minutes:
hybrid, experts or both; steps, packed or unpacked.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import Row, faster, in_turn, report
from benchmarks.peft_loop import PeftLoop
from benchmarks.sampler_decode import decode_s
from benchmarks.sampler_workloads import Ours, Request, adapter_path
from benchmarks.workloads import ADAM, LONG, InProcess, random_documents
from mint_core.model import inference
from mint_core.model.reproducible import ask_for_reproducible_products
from sampler_service.jobs import BASE_MODEL
from tests.engines_in_process import make_engine
from tests.families import named

ROUNDS = 5
ADAPTERS, TOKENS, PROMPT_TOKENS = 8, 24, 32
VOCABULARY_SIZE = 8192
SHORT = (20, 22, 24, 24, 25, 25, 26, 28) * 2  # tokens of documents
LINEAR = "linear_attention"
WIDE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
STATES = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": [LINEAR, LINEAR, LINEAR, "full_attention"] * 2,
}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
# Families, sizes, and how many times as fast a step is to be as the loop.
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "hybrid": ("Qwen 3.5 of text", {**WIDE, **STATES}, 1.5),
    "experts": (
        "Qwen 3 MoE",
        {**WIDE, **EXPERTS, "num_key_value_heads": 4, "mlp_only_layers": []},
        2.0,
    ),
    "both": (
        "Qwen 3.5 MoE of text",
        {**WIDE, **STATES, **EXPERTS, "shared_expert_intermediate_size": 256},
        1.5,
    ),
}


def steps(folder: Path, model: str, target: float) -> list[Row]:
    run = InProcess(make_engine(folder))
    loop = PeftLoop(folder, run.specs[0], ADAM)
    rows = []
    for name, lengths in (("documents of 64 to 512 tokens", LONG), ("16 short examples", SHORT)):
        documents = random_documents(lengths, vocabulary_size=VOCABULARY_SIZE)
        variants: dict[str, Callable[[], object]] = {
            "ours": lambda documents=documents: run.train(documents, weighted=True),  # type: ignore[misc]
            "loop": lambda documents=documents: loop.train(documents),  # type: ignore[misc]
        }
        times = in_turn(variants, ROUNDS)
        own = target if lengths is LONG or model == "hybrid" else None
        rows.append(faster(f"a step, {name}", times["ours"], times["loop"], own))
    return rows


def decoding(folder: Path, target: float) -> list[Row]:
    ours = Ours(ADAPTERS, folder)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, VOCABULARY_SIZE, (ADAPTERS, PROMPT_TOKENS)).tolist()
    requests = [Request(prompt, TOKENS) for prompt in prompts]
    paths = [adapter_path(number) for number in range(ADAPTERS)]
    times: dict[str, list[float]] = {"eight": [], "base": []}
    for number in range(ROUNDS + 1):
        for name, adapters in (("eight", paths), ("base", [BASE_MODEL])):
            seconds = decode_s(lambda r, a=adapters: ours.generate(r, a), requests)  # type: ignore[misc]
            if number:
                times[name].append(seconds)
    name = f"8 sequences, 8 adapters, against none (rows: {ours.sampler.engine.base.min_rows})"
    return [faster(name, times["eight"], times["base"], target)]


def unpacked(folder: Path) -> list[Row]:
    """As on a processor whose oneDNN does not compute rows alike: passes are filled up to 4."""
    inference.available = lambda device, dtype: False
    return decoding(folder, 0.45)


def main(arguments: Sequence[str]) -> None:
    model, part = arguments
    family, sizes, target = MODELS[model]
    parts = {
        "steps": lambda folder: steps(folder, model, target),
        "packed": lambda folder: decoding(folder, 0.7),
        "unpacked": unpacked,
    }
    ask_for_reproducible_products()  # before the model is made
    with tempfile.TemporaryDirectory() as name:
        report(parts[part](named(family).make(Path(name), **sizes)))


if __name__ == "__main__":
    main(sys.argv[1:])
