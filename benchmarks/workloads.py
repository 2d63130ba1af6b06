"""What the benchmarks train on: seeded documents, and the engine that trains on them in process."""

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from mint_core.lora.spec import AdapterSpec, LoraRequest
from mint_core.lora.targets import HEAD
from mint_core.model.loading import LoadedBase
from tests.engines_in_process import make_engine
from tests.models import tiny_qwen3
from trainer_service.calls import Compute
from trainer_service.engine.engine import Engine
from trainer_service.jobs import (
    AdamParams,
    CreateRow,
    CrossEntropy,
    Document,
    DropRow,
    Plan,
    RowDescription,
    StepRow,
    StepRows,
)
from trainer_service.queue.planner import Planner, cut, most_tile_tokens

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


def smollm2_engine(**changes: object) -> Engine:
    """One thread, float32, everything else as served but for the changes."""
    return make_engine(SMOLLM2, base_model_name="SmolLM2-135M-Instruct", **changes)


def tiny_engine() -> Engine:
    """The tests' model of 2 layers and width 64: what counts is calls."""
    with tempfile.TemporaryDirectory() as folder:
        return make_engine(tiny_qwen3(Path(folder)))


def small_engine() -> Engine:
    """A model of 4 layers and width 256: small, but one that computes."""
    with tempfile.TemporaryDirectory() as folder:
        return make_engine(make_small_model(Path(folder)))


def make_small_model(folder: Path) -> Path:
    config = Qwen3Config.from_pretrained(tiny_qwen3(folder))
    config.num_hidden_layers, config.layer_types = 4, 2 * config.layer_types
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 768, 64
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def needed_flops(base: LoadedBase, documents: Sequence[Document], rank: int) -> float:
    """What a step must compute: 2 N forward and 2 N backward per token, of the head on weighted
    rows alone; adapters 6 P; attention forward and twice that backward.
    """
    config = base.model.config
    tokens = sum(len(d.tokens) for d in documents)
    rows = {HEAD: sum(int((d.weights != 0).sum()) for d in documents)}
    total = 0.0
    for name, shape in base.shapes.items():
        weights = shape.in_features * shape.out_features
        adapter = rank * (shape.in_features + shape.out_features)
        total += rows.get(name, tokens) * (4 * weights + 6 * adapter)
    width = config.num_attention_heads * config.head_dim  # type: ignore[union-attr,operator]
    pairs = sum(len(d.tokens) ** 2 / 2 for d in documents)  # query and key, causal
    return total + 3 * 4 * config.num_hidden_layers * float(width) * pairs  # type: ignore[union-attr,operator]


class InProcess:
    """Runs on an engine in this process, their calls planned as the trainer's front plans them."""

    def __init__(self, engine: Engine, count: int = 1, request: LoraRequest = LORA) -> None:
        self.engine = engine
        self.names = [f"run-{uuid.uuid4().hex[:8]}" for _ in range(count)]
        self.specs = [self._create(name, request) for name in self.names]

    def _create(self, name: str, request: LoraRequest) -> AdapterSpec:
        description = self.engine.run(CreateRow(training_run_id=name, request=request))
        assert isinstance(description, RowDescription)
        return description.spec

    def drop(self) -> None:
        for name in self.names:
            self.engine.run(DropRow(name))

    def train(self, *data: Sequence[Document], weighted: bool) -> None:
        """One step of training of each run, on its data, all of them at once."""
        self._train(list(zip(self.names, data, strict=True)), weighted)

    def train_in_turn(self, *data: Sequence[Document], weighted: bool) -> None:
        """The same, one run after the other."""
        for call in zip(self.names, data, strict=True):
            self._train([call], weighted)

    def step(self) -> None:
        """An optimizer step of each run."""
        self.engine.run(StepRows(tuple(StepRow(name, ADAM) for name in self.names)))

    def _train(self, calls: Sequence[tuple[str, Sequence[Document]]], weighted: bool) -> None:
        for plan in plans(self.engine.max_batch_tokens, calls, weighted):
            self.engine.run(plan)
        self.engine.run(StepRows(tuple(StepRow(name, ADAM) for name, _ in calls)))


def plans(
    max_batch_tokens: int, calls: Sequence[tuple[str, Sequence[Document]]], weighted: bool
) -> Iterator[Plan]:
    """The passes over calls of several runs that arrive together."""
    planner = Planner(max_batch_tokens)
    for name, documents in calls:
        compute = Compute(
            documents=tuple(documents), loss=CrossEntropy(), backward=True, weighted_only=weighted
        )
        most = most_tile_tokens(max_batch_tokens)
        planner.add(name, cut(compute, most, training_run_id=name, sequence=1))
    while (job := planner.next_job()) is not None:
        assert isinstance(job, Plan)
        yield job
