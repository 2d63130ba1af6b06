"""The page's own code, as printed, against both services.

MINT_SEED_PAGE names the file. Here is only what the page leaves undefined: `re`, `batches` and
`TrainOnWhat`.
"""

import ast
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mint
from mint import types
from mint.recipe.renderers import TrainOnWhat
from tests.page_code import code_blocks
from tests.services import Services

PAGE = Path(os.environ.get("MINT_SEED_PAGE", ""))  # unset: this folder, which is no file
QUESTIONS = [{"question": f"What is {a} * {b}?"} for a, b in ((2, 3), (4, 5), (12, 11), (7, 8))]
STEPS = 3


pytestmark = [
    pytest.mark.skipif(not PAGE.is_file(), reason="MINT_SEED_PAGE names no file"),
    # The tiny model's chat template is plain ChatML, without Qwen3's thinking: the renderer warns.
    pytest.mark.filterwarnings("ignore::mint.recipe.renderers.RendererMismatchWarning"),
]


def batches_of(namespace: dict[str, Any]) -> Iterator[list[types.Datum]]:
    """The same batch again and again, made by the page's own function once that is defined."""
    for _ in range(STEPS):
        tokenizer = namespace["tokenizer"]
        yield [namespace["process_sft_example"](question, tokenizer) for question in QUESTIONS]


def run_page(page: str) -> dict[str, Any]:
    """Runs the blocks one after another, as in one script, and returns their variables."""
    namespace: dict[str, Any] = {"re": re, "TrainOnWhat": TrainOnWhat}
    namespace["batches"] = batches_of(namespace)
    blocks = code_blocks(page)
    assert len(blocks) >= 4, "the page's code was not found"
    for number, block in enumerate(blocks):
        exec(compile(block, f"<block {number} of the page>", "exec"), namespace)
    return namespace


def test_the_page_runs_as_printed(
    services: Services, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    services.point_environment_at_them(monkeypatch)
    variables = run_page(PAGE.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out

    training = variables["training_client"]
    assert isinstance(training, mint.TrainingClient)
    assert training.get_info().model_data.model_name == "Qwen/Qwen3-0.6B"
    check_losses(printed, variables["result"])
    check_samples(variables["samples"])
    check_rendered(variables)
    check_all_assistant_turns(variables)
    variables["service_client"].close()


def check_losses(printed: str, result: types.ForwardBackwardOutput) -> None:
    """Each step printed its metrics, and training on one batch lowered its loss."""
    metrics = [ast.literal_eval(text) for text in re.findall(r"metrics=(\{.*\})", printed)]
    losses = [values["loss:sum"] for values in metrics]
    assert len(losses) == STEPS
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert result.metrics == metrics[-1]
    for output in result.loss_fn_outputs:
        assert all(math.isfinite(logprob) for logprob in output["logprobs"].tolist())
    assert len(result.loss_fn_outputs) == len(QUESTIONS)


def check_samples(samples: types.SampleResponse) -> None:
    assert isinstance(samples.sequences, list)
    assert len(samples.sequences) == 4
    assert all(1 <= len(sequence.tokens) <= 16 for sequence in samples.sequences)


def check_rendered(variables: dict[str, Any]) -> None:
    """The response counts, with the token that ends it; the datum is the same, shifted by one."""
    tokens, weights = variables["model_input"].to_ints(), variables["weights"]
    assert len(tokens) == len(weights)
    counted = np.flatnonzero(weights)
    assert np.array_equal(counted, np.arange(counted[0], counted[-1] + 1))
    assert set(np.asarray(weights)[counted].tolist()) == {1}
    tokenizer, (_, response) = variables["tokenizer"], variables["messages"]
    text = tokenizer.decode([tokens[i] for i in counted])
    assert text.endswith(response["content"] + tokenizer.eos_token)
    assert response["content"] not in tokenizer.decode(tokens[: counted[0]])

    datum = variables["datum"]
    assert datum.model_input.to_ints() == tokens[:-1]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
    assert datum.loss_fn_inputs["weights"].tolist() == list(weights[1:])


def check_all_assistant_turns(variables: dict[str, Any]) -> None:
    """What the page says of several turns: the last one counts, all of them where asked."""
    turns = variables["messages"] * 2
    renderer, everything = variables["renderer"], TrainOnWhat.ALL_ASSISTANT_MESSAGES
    _, last = renderer.build_supervised_example(turns)
    _, both = renderer.build_supervised_example(turns, train_on_what=everything)
    assert sum(both) > sum(last) > 0
    assert variables["training_client"].forward([variables["datum"]]).result().metrics
