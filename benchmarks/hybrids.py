"""What do layers with states cost? A step of training against the loop that a user would write with
PEFT and transformers, and decoding with 8 adapters against none. A random Qwen3.5 of 8 layers and
width 512, of which every fourth attends; rank 16 on all linear layers and the head, one thread.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.comparison import Row, faster, in_turn, report
from benchmarks.peft_loop import PeftLoop
from benchmarks.sampler_decode import decode_s
from benchmarks.sampler_workloads import Ours, Request, adapter_path
from benchmarks.workloads import ADAM, LONG, InProcess, random_documents
from mint_core.model.reproducible import ask_for_reproducible_products
from sampler_service.jobs import BASE_MODEL
from tests.engines_in_process import make_engine
from tests.hybrids import tiny_qwen3_5

ROUNDS = 5
ADAPTERS, TOKENS, PROMPT_TOKENS = 8, 24, 32
VOCABULARY_SIZE = 8192
SHORT = (20, 22, 24, 24, 25, 25, 26, 28) * 2  # tokens of documents
LINEAR = "linear_attention"
SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": [LINEAR, LINEAR, LINEAR, "full_attention"] * 2,
}


def training(folder: Path) -> list[Row]:
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
        rows.append(faster(f"a step, {name}", times["ours"], times["loop"], 1.5))
    return rows


def decoding(folder: Path) -> Row:
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
    packed = ours.sampler.engine.base.min_rows == 1
    name = f"8 sequences, 8 adapters, against none ({'' if packed else 'not '}packed)"
    return faster(name, times["eight"], times["base"], 0.7 if packed else 0.45)


def main() -> None:
    ask_for_reproducible_products()  # before the model is made
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_qwen3_5(Path(name), **SIZES)
        report([*training(folder), decoding(folder)])


if __name__ == "__main__":
    main()
