"""What does a mixture of experts cost whose experts stay frozen? A step of training against the
loop that a user would write, and eight adapters against none while decoding. Qwen3-MoE of 8 layers
and width 512, 32 experts of which a token goes to 4, rank 16 on all linear layers, one thread.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import Qwen3MoeConfig

from benchmarks.comparison import Row, cpu_seconds, faster, in_turn, report
from benchmarks.peft_loop import PeftLoop
from benchmarks.sampler_workloads import Ours, Request, adapter_path
from benchmarks.workloads import ADAM, LONG, InProcess, random_documents
from mint_core.model import inference
from sampler_service.jobs import BASE_MODEL
from tests.engines_in_process import make_engine
from tests.mixtures import make_mixture
from trainer_service.jobs import Document

ROUNDS = 5
VOCABULARY_SIZE = 8192
ADAPTERS, PROMPT_TOKENS, TOKENS = 8, 32, 24
SHORT = (24,) * 16  # tokens of as many documents
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)


def training(folder: Path) -> list[Row]:
    run = InProcess(make_engine(folder))
    loop = PeftLoop(folder, run.specs[0], ADAM)

    def row(name: str, documents: Sequence[Document], target: float | None) -> Row:
        times = in_turn(
            {
                "ours": lambda: run.train(documents, weighted=True),
                "loop": lambda: loop.train(documents),
            },
            ROUNDS,
        )
        return faster(name, times["ours"], times["loop"], target)

    long, short = (random_documents(n, vocabulary_size=VOCABULARY_SIZE) for n in (LONG, SHORT))
    return [
        row("documents of 64 to 512 tokens", long, 2.0),
        row("16 documents of 24 tokens: nothing to pad", short, None),
    ]


def decoding(folder: Path, *, packed: bool) -> Row:
    if not packed:  # as on a processor whose oneDNN does not compute rows alike
        inference.available = lambda device, dtype: False
    ours = Ours(ADAPTERS, folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(100, VOCABULARY_SIZE, PROMPT_TOKENS).tolist() for _ in range(ADAPTERS)]

    def decode_s(adapters: Sequence[str]) -> float:
        """CPU seconds of the tokens after the first."""
        first, whole = ([Request(prompt, n) for prompt in prompts] for n in (1, TOKENS))
        return cpu_seconds(lambda: ours.generate(whole, adapters)) - cpu_seconds(
            lambda: ours.generate(first, adapters)
        )

    paths = [adapter_path(i) for i in range(ADAPTERS)]
    variants: dict[str, Callable[[], float]] = {
        "eight": lambda: decode_s(paths),
        "base": lambda: decode_s([BASE_MODEL]),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(ROUNDS + 1):
        for name, measure in variants.items():
            seconds = measure()
            if number:
                times[name].append(seconds)
    kind, target = ("packed", 0.7) if packed else ("not packed", 0.45)
    assert (ours.sampler.engine.base.min_rows == 1) == packed
    name = f"8 adapters in 8 sequences, weights {kind}"
    return faster(name, times["eight"], times["base"], target)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_mixture(Path(name), CONFIG)
        rows = training(folder)
        report([*rows, *(decoding(folder, packed=packed) for packed in (True, False))])


if __name__ == "__main__":
    main()
