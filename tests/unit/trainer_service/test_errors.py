"""What the engine refuses, as the front gets it."""

import pickle
import subprocess
import sys

import pytest

from mint_core.errors import MintError
from trainer_service import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.NonFiniteGradient(),
        errors.NonFiniteStep(1.0, 0.0, 0.0),
        errors.LossNotFinite("the loss"),
        errors.NonFiniteExport(["a"], "float16"),
        errors.RowStorageFull("full"),
    ],
    ids=lambda error: error.reason,
)
def test_an_engines_error_brings_no_torch_into_the_front(error: MintError) -> None:
    program = (
        "import pickle, sys; error = pickle.load(sys.stdin.buffer);"
        "print(error.reason, 'torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(error), capture_output=True, check=True
    )
    assert answer.stdout.decode().split() == [error.reason, "False"]
