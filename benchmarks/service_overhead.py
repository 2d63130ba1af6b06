"""What do the services add to the engine? The same call in process and over gRPC, in turn.

The call is `forward_backward` on a model so small that the addition shows. Over gRPC it takes from
the client's method to its result: conversion, network, checks, planning, the engine process's pipe.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import Qwen3Config, Qwen3ForCausalLM

import mint
from mint import types
from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import EngineRun, make_engine
from tests.models import VOCABULARY_SIZE, tiny_qwen3
from tests.servers import running_trainer
from trainer_service.jobs import CrossEntropy, Document

SHAPES = ((1, 64), (1, 512), (1, 2048), (32, 64))  # sequences, and tokens of each
TARGET_TOKENS, TARGET_MS = 2048, 3.0  # for the median
ROUNDS, CALLS = 15, 10  # calls of each kind in a round; the first round warms up
Row = dict[str, object]


def make_model(folder: Path) -> Path:
    """The tests' tiny model with its tokenizer, made smaller still."""
    config = Qwen3Config.from_pretrained(tiny_qwen3(folder))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 16, 32
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 1, 1, 16
    config.layer_types = config.layer_types[:1]
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(sequences: int, length: int) -> tuple[list[types.Datum], list[Document]]:
    """The same random sequences for the client and for the engine."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, VOCABULARY_SIZE, (2, sequences, length))
    weights = np.ones(length, np.float32)
    data, documents = [], []
    for tokens, target in zip(inputs, targets, strict=True):
        given = {"target_tokens": target, "weights": weights}
        data.append(types.Datum(types.ModelInput.from_ints(tokens.tolist()), given))
        documents.append(Document(tokens=tokens, targets=target, weights=weights))
    return data, documents


def elapsed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def measure(client: mint.TrainingClient, run: EngineRun, shape: tuple[int, int]) -> Row:
    """One row, in milliseconds: medians, and by how much calls exceed their round's in process."""
    data, documents = make_data(*shape)
    over_grpc = lambda: client.forward_backward(data).result()  # noqa: E731
    in_process = lambda: run.compute(run.tile(documents, CrossEntropy()))  # noqa: E731
    got, expected = over_grpc(), in_process()
    for output, logprobs in zip(got.loss_fn_outputs, expected.logprobs, strict=True):
        assert np.array_equal(output["logprobs"].to_numpy(), logprobs), "not the same engine"
    kinds = (over_grpc, in_process)
    times = [[[elapsed_ms(call) for _ in range(CALLS)] for call in kinds] for _ in range(ROUNDS)]
    ours, baseline = np.array(times)[1:].swapaxes(0, 1)  # [rounds, calls]
    added = ours - np.median(baseline, axis=1, keepdims=True)
    client.discard_gradient().result()
    return {
        "name": f"forward_backward {shape[0]} x {shape[1]} tokens",
        "ours": round(np.median(ours), 2),
        "baseline": round(np.median(baseline), 2),
        "added_ms": round(np.median(added), 2),
        "added_p95_ms": round(np.quantile(added, 0.95), 2),
        "target": TARGET_MS if math.prod(shape) == TARGET_TOKENS else None,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name, "model"))
        run = EngineRun(make_engine(model), "local", LoraRequest(rank=16, seed=0))
        with (
            running_trainer(model, Path(name, "store"), threads=1) as trainer,
            mint.ServiceClient(base_url=trainer.address) as service,
        ):
            client = service.create_lora_training_client(rank=16, seed=0)
            rows = [measure(client, run, shape) for shape in SHAPES]
    print(f"{'':32}  over gRPC  in process  added p50  added p95  [ms]")
    line = "{name:32} {ours:10} {baseline:11} {added_ms:10} {added_p95_ms:10}"
    print(*(line.format_map(row) for row in rows), *map(json.dumps, rows), sep="\n")


if __name__ == "__main__":
    main()
