"""How much memory does a step of training take beyond the weights, and how much of it the head and
the loss? Against the padded loop, and against full logits. SmolLM2, rank 16, one thread.
"""

import torch
from torch.nn import functional

from benchmarks.comparison import peak_bytes, report, share
from benchmarks.peft_loop import PeftLoop
from benchmarks.workloads import (
    ADAM,
    LONG,
    SMOLLM2,
    InProcess,
    random_documents,
    smollm2_engine,
)
from mint_core.lora.segments import Segment
from mint_core.model.head import Piece

ROUNDS = 2
MIB = 2**20


def main() -> None:
    engine = smollm2_engine()
    documents = random_documents(LONG, vocabulary_size=49152)
    run = InProcess(engine)
    loop = PeftLoop(SMOLLM2, run.specs[0], ADAM)
    loop.step_on_zero_gradient()  # makes gradients and moments, which we hold from the start
    ours = lambda: run.train(documents, weighted=True)  # noqa: E731
    theirs = lambda: loop.train(documents)  # noqa: E731
    pairs = [(peak_bytes(ours), peak_bytes(theirs)) for _ in range(ROUNDS)]
    steps = [[peak / MIB for peak in peaks] for peaks in zip(*pairs, strict=True)]

    base = engine.base
    tokens = sum(LONG)
    hidden = torch.randn(tokens, base.shapes["lm_head"].in_features)
    targets = torch.from_numpy(documents[0].targets[:1]).expand(tokens).clone()
    pieces = [Piece(Segment(0, tokens), torch.arange(tokens))]

    def chunked() -> None:
        base.head.gradient(hidden, pieces, [targets], lambda _, place, z: torch.full_like(z, -1.0))

    weight = base.model.get_submodule("lm_head").weight

    def full() -> None:
        leaf = hidden.clone().requires_grad_()
        logits = functional.linear(leaf, weight)  # type: ignore[arg-type]
        functional.cross_entropy(logits, targets, reduction="sum").backward()

    pairs = [(peak_bytes(chunked), peak_bytes(full)) for _ in range(ROUNDS)]
    heads = [[peak / MIB for peak in peaks] for peaks in zip(*pairs, strict=True)]
    report(
        [
            share(
                "documents of 64 to 512 tokens, memory beyond weights",
                *steps,
                target=0.25,
                unit="MiB",
            ),
            share(f"head and loss on {tokens} tokens", *heads, target=0.1, unit="MiB"),
        ]
    )


if __name__ == "__main__":
    main()
