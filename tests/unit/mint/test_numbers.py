"""Numbers out of tensors, arrays and lists of either, for every field that takes numbers."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mint
from mint import types
from mint.types._checks import integer

PROMPT = types.ModelInput.from_ints([1, 2])
VALUES = [0.5, -2.0]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
FIELDS = ["weights", "logprobs", "advantages", "clip_low_threshold", "something_of_a_loss"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_list_of_torch_scalars_is_taken_as_the_whole_tensor_is(
    dtype: torch.dtype, field: str
) -> None:
    tensor = torch.tensor(VALUES).to(dtype)
    trained = torch.tensor(VALUES, requires_grad=True).to(dtype)
    whole = types.Datum(PROMPT, {field: tensor})

    for values in (list(tensor), tuple(trained), [VALUES[0], trained[1]], trained):
        assert types.Datum(PROMPT, {field: values}) == whole


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(VALUES, requires_grad=True),
        list(torch.tensor(VALUES).bfloat16()),
        list(np.array(VALUES, np.float16)),
        [np.float64(VALUES[0]), np.array(VALUES[1])],
        [torch.tensor(VALUES[0], requires_grad=True), np.float32(VALUES[1])],
    ],
)
def test_nested_lists_and_matrices_are_taken_alike(values: Any) -> None:
    expected = types.TensorData([VALUES, VALUES])

    assert types.TensorData([values, values]) == expected
    assert types.TensorData([list(values), values]) == expected
    assert types.TensorData([*values, *values], shape=torch.Size([2, 2])) == expected
    assert types.TensorData([*values, *values], shape=torch.tensor([2, 2])) == expected  # type: ignore[arg-type]
    rows, columns = list(torch.tensor([0, 2])), list(torch.tensor([0, 1]))
    sparse = types.TensorData(list(values), None, [1, 2], rows, columns)
    assert sparse == types.TensorData([VALUES])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint16], ids=str)
def test_token_ids_are_taken_out_of_torch_scalars(dtype: torch.dtype) -> None:
    tokens = list(torch.tensor([1, 2]).to(dtype))

    assert types.ModelInput.from_ints(tokens) == PROMPT
    assert types.ModelInput.from_ints(tokens[:1]).append_int(tokens[1]).to_ints() == [1, 2]
    assert types.EncodedTextChunk(tokens).tokens == [1, 2]
    targets = types.Datum(PROMPT, {"target_tokens": tokens}).loss_fn_inputs["target_tokens"]
    assert targets == types.TensorData([1, 2])
    params = types.SamplingParams(stop=tokens, stop_token_ids=tokens).to_proto()
    assert list(params.stop_token_ids) == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "make", [torch.tensor, np.array, np.float32], ids=["torch", "array", "float32"]
)
def test_options_are_taken_out_of_scalars(make: Callable[[float], Any]) -> None:
    half = make(0.5)

    assert types.AdamParams(half, betas=[half, half], eps=half) == types.AdamParams(
        0.5, betas=(0.5, 0.5), eps=0.5
    )
    assert types.SamplingParams(temperature=half, top_p=half).to_proto().temperature == 0.5
    assert types.LoraConfig(alpha=half).to_proto().alpha == 0.5


def test_an_option_that_requires_grad_is_taken_without_a_warning() -> None:
    rate = torch.tensor(0.5, requires_grad=True)

    assert types.AdamParams(rate) == types.AdamParams(0.5)  # type: ignore[arg-type]


def test_numbers_that_are_whole_in_their_type_alone_count() -> None:
    assert types.LoraConfig(rank=torch.tensor(4)).to_proto().rank == 4  # type: ignore[arg-type]
    assert integer(np.int32(4), "rank") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": torch.tensor(3.7)}, "`rank` is 3.7"),
        ({"rank": torch.tensor([3, 4])}, "`rank` holds 2 numbers; give one"),
        ({"rank": np.array([3, 4])}, "`rank` holds 2 numbers; give one"),
        ({"rank": torch.tensor(True)}, "`rank` holds booleans"),
        ({"alpha": np.array([1.0, 2.0])}, "`alpha` holds 2 numbers; give one"),
        ({"alpha": torch.empty(0)}, "`alpha` holds 0 numbers; give one"),
        ({"alpha": np.bool_(True)}, "`alpha` holds booleans"),
        ({"alpha": torch.tensor(1j)}, "`alpha` holds complex"),
        ({"alpha": 10**400}, "`alpha` is beyond"),
    ],
)
def test_what_is_no_number_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mint.BadRequestError, match=message):
        types.LoraConfig(**options).to_proto()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.zeros(2).bfloat16(), torch.zeros(1).bfloat16()], "is ragged"),
        ([torch.zeros((), device="meta")], "cannot be read"),
        (torch.zeros(2, device="meta"), "cannot be read"),
        (list(torch.tensor([True, False])), "holds booleans"),
        ([1.0, -1e39], r"holds -1e\+39 at 1; every entry must be finite in float32"),
        (torch.tensor([3.5e38, 0.0], dtype=torch.float64), r"holds 3\.5e\+38 at 0"),
        ([torch.tensor(float("nan"), requires_grad=True)], "holds nan at 0"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(mint.BadRequestError, match=message) as caught:
        types.Datum(PROMPT, {"weights": values})

    assert caught.value.field == "loss_fn_inputs.weights"


def test_integers_beyond_64_bits_keep_their_value_or_are_refused() -> None:
    with pytest.raises(mint.BadRequestError, match="holds 18446744073709551615, beyond 64 bits"):
        types.TensorData(np.array([2**64 - 1], np.uint64))
    assert types.TensorData(np.array([7], np.uint64)).tolist() == [7]


WITHOUT_TORCH = """
import sys, numpy as np
from mint import types
prompt = types.ModelInput.from_ints([np.int32(1)])
types.Datum(prompt, {"weights": [np.float16(1)], "advantages": np.ones(1), "logprobs": [0.5]})
try:
    types.Datum(prompt, {"weights": [object()]})
except ValueError:
    print("torch" in sys.modules)
"""


def test_torch_is_not_imported_for_what_is_not_of_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
