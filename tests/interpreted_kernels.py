"""The Triton kernels as tests run them: on a GPU where there is one, else on the CPU through
Triton's interpreter, as conftest.py asks. Import this first; without Triton the tests are skipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mint_core.lora import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

interpreter = pytest.importorskip("triton.runtime.interpreter")
_patch_tensor = interpreter._patch_lang_tensor


def _patch(tensor: object, scope: Any) -> None:
    """Triton 3.6 makes a Python number of an array in a way that numpy refuses since 2.4."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


@contextmanager
def in_kernels() -> Iterator[None]:
    """Around what kernels compute on a CPU too."""
    kernels.interpreted = True
    try:
        yield
    finally:
        kernels.interpreted = False


@contextmanager
def products_by_rows() -> Iterator[None]:
    """Around what must not depend on a row's place in a tile: the interpreter's products are
    numpy's, in which on some CPUs it does. A GPU's are its own.
    """
    execute = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, d: Any, *others: Any) -> Any:
        rows = interpreter.TensorHandle(a.data[:, None], a.dtype)
        sums = interpreter.TensorHandle(d.data[:, None], d.dtype)
        result = execute(builder, rows, b, sums, *others)
        result.data = result.data[:, 0]
        return result

    interpreter.InterpreterBuilder.create_dot = dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = execute
