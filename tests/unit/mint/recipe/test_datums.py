"""Datums out of rendered conversations."""

import numpy as np
import pytest

import mint
from mint import recipe, types
from mint.recipe import TrainOnWhat
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import LLAMA3

TOKENS = [5, 6, 7, 8, 9]
WEIGHTS = np.array([0, 0, 1, 0, 1], np.float32)


def datum(max_length: int | None = None, **options: str) -> types.Datum:
    model_input = types.ModelInput.from_ints(TOKENS)
    return recipe.datum_from_model_input_weights(model_input, WEIGHTS, max_length, **options)  # type: ignore[arg-type]


def targets(datum: types.Datum) -> list[int]:
    return datum.loss_fn_inputs["target_tokens"].tolist()


def weights(datum: types.Datum) -> list[float]:
    return datum.loss_fn_inputs["weights"].tolist()


def test_each_token_is_the_target_of_the_one_before() -> None:
    """Requirements 14 and 22."""
    made = datum()
    assert made.model_input.to_ints() == [5, 6, 7, 8]
    assert targets(made) == [6, 7, 8, 9]
    assert weights(made) == [0.0, 1.0, 0.0, 1.0]
    assert made.loss_fn_inputs.keys() == {"target_tokens", "weights"}


def test_the_right_end_is_cut_before_the_shift() -> None:
    """Requirement 22."""
    made = datum(max_length=4)
    assert made.model_input.to_ints() == [5, 6, 7]
    assert targets(made) == [6, 7, 8]
    assert weights(made) == [0.0, 1.0, 0.0]
    assert targets(datum(max_length=5)) == targets(datum(max_length=99)) == targets(datum())


def test_a_mean_has_weights_of_sum_one_after_the_cut() -> None:
    assert weights(datum(reduction="mean")) == [0.0, 0.5, 0.0, 0.5]
    assert weights(datum(4, reduction="mean")) == [0.0, 1.0, 0.0]
    assert weights(datum(2, reduction="mean")) == [0.0]


@pytest.mark.parametrize(
    ("tokens", "given", "options", "problem"),
    [
        ([1, 2, 3], [1, 1], {}, r"`weights` has shape \[2\] but `model_input` has 3 tokens"),
        ([1, 2], [[1, 1]], {}, r"has shape \[1, 2\]"),
        ([1, 2], [1, np.nan], {}, "`weights` holds NaN or Inf"),
        ([1, 2], [1, 1], {"max_length": 1}, "`max_length` is 1"),
        ([1], [1], {}, "`model_input` has 1 tokens"),
        ([1, 2], [1, 1], {"reduction": "max"}, "`reduction` is 'max'"),
    ],
)
def test_bad_input_is_refused(
    tokens: list[int], given: list[float], options: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        recipe.datum_from_model_input_weights(
            types.ModelInput.from_ints(tokens),
            given,
            **options,  # type: ignore[arg-type]
        )


def test_a_conversation_has_other_defaults(make_tokenizer: MakeTokenizer) -> None:
    """Requirement 26: all assistant messages, weights of sum 1."""
    renderer = recipe.renderers.get_renderer(
        "llama3", make_tokenizer(LLAMA3, bos_token="<|begin_of_text|>")
    )
    messages = conversation("Q1", "A1", "Q2", "A2")
    model_input, rendered = renderer.build_supervised_example(
        messages, TrainOnWhat.ALL_ASSISTANT_MESSAGES
    )

    mean = recipe.conversation_to_datum(messages, renderer, 2048)
    plain = recipe.conversation_to_datum(messages, renderer, 2048, reduction="sum")
    last = recipe.conversation_to_datum(
        messages, renderer, None, TrainOnWhat.LAST_ASSISTANT_MESSAGE, "sum"
    )

    assert mean.model_input.to_ints() == model_input.to_ints()[:-1]
    assert weights(plain) == rendered[1:].tolist()
    assert weights(mean) == pytest.approx((rendered[1:] / rendered[1:].sum()).tolist())
    assert sum(weights(last)) == sum(weights(plain)) / 2


def test_the_names_that_scripts_use() -> None:
    """Requirements 19 to 25: everything is reached from `mint.recipe`."""
    assert recipe.renderers.TrainOnWhat is recipe.TrainOnWhat
    assert recipe.renderers.get_renderer
    assert recipe.Message(role="user", content="a") == {"role": "user", "content": "a"}
    assert mint.__name__ == "mint"
