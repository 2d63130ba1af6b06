"""What the benchmarks train on: seeded documents, and the engine that trains on them in process."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import make_engine
from trainer_service.calls import Call, Compute, Place
from trainer_service.engine.engine import Engine
from trainer_service.jobs import (
    AdamParams,
    CreateRow,
    CrossEntropy,
    Document,
    Plan,
    StepRow,
    StepRows,
    StepResult,
)
from trainer_service.planner import Planner, cut

SMOLLM2 = Path(".models/SmolLM2-135M-Instruct")  # `make model`
LONG = (64, 96, 128, 160, 256, 512)  # tokens of the first workload's documents
LORA = LoraRequest(rank=16, seed=0)  # all linear layers and the head
ADAM = AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)


def random_documents(
    lengths: Sequence[int], *, vocabulary_size: int, seed: int = 0
) -> tuple[Document, ...]:
    """Random tokens; the second half of each document has weight 1, the first 0."""
    rng = np.random.default_rng(seed)
    documents = []
    for n in lengths:
        stream = rng.integers(0, vocabulary_size, n + 1)
        weights = np.zeros(n, np.float32)
        weights[n // 2 :] = 1.0
        documents.append(Document(tokens=stream[:-1], targets=stream[1:], weights=weights))
    return tuple(documents)


def arithmetic(count: int, *, seed: int = 0) -> tuple[Document, ...]:
    """Products as examples/quickstart.py asks them, about 25 tokens each; the answer has weight."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    documents = []
    for a, b in np.random.default_rng(seed).integers(2, 1000, (count, 2)).tolist():
        prompt = tokenizer.encode(f"Question: What is {a} * {b}?\nAnswer:")
        answer = tokenizer.encode(f" {a * b}", add_special_tokens=False)
        stream = np.array([*prompt, *answer, tokenizer.eos_token_id])
        weights = np.zeros(len(stream) - 1, np.float32)
        weights[len(prompt) - 1 :] = 1.0
        documents.append(Document(tokens=stream[:-1], targets=stream[1:], weights=weights))
    return tuple(documents)


def smollm2_engine() -> Engine:
    """One thread, float32, everything else as served."""
    return make_engine(SMOLLM2, base_model_name="SmolLM2-135M-Instruct")


class InProcess:
    """A run on an engine in this process, its calls planned as the trainer's front plans them."""

    def __init__(self, engine: Engine, name: str, request: LoraRequest = LORA) -> None:
        self.engine, self.name = engine, name
        self.description = engine.run(CreateRow(training_run_id=name, request=request))

    def forward_backward(self, documents: Sequence[Document], *, weighted: bool) -> None:
        for plan in plans(self.engine.max_batch_tokens, [(self.name, documents)], weighted):
            self.engine.run(plan)

    def step(self) -> StepResult:
        (result,) = self.engine.run(StepRows((StepRow(self.name, ADAM),)))  # type: ignore[misc]
        return result

    def train(self, documents: Sequence[Document], *, weighted: bool) -> None:
        """One step of training."""
        self.forward_backward(documents, weighted=weighted)
        self.step()


def plans(
    max_batch_tokens: int, calls: Sequence[tuple[str, Sequence[Document]]], weighted: bool
) -> Iterator[Plan]:
    """The passes over calls of several runs that arrive together."""
    planner = Planner(max_batch_tokens)
    for name, documents in calls:
        compute = Compute(
            documents=tuple(documents), loss=CrossEntropy(), backward=True, weighted_only=weighted
        )
        place = Place(
            training_run_id=name,
            sequence=1,
            writer_epoch=1,
            acknowledged_sequence=0,
            payload_hash=b"",
        )
        planner.add(name, cut(Call(place, "ForwardBackward", compute), compute, max_batch_tokens))
    while (job := planner.next_job()) is not None:
        assert isinstance(job, Plan)
        yield job
