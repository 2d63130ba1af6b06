"""Reads a model and ends: for tests of the memory that this takes.

    python -m tests.reading SMALL LARGE DEVICE DTYPE

It loads a small model first, for what is imported and allocated once, says `ready`, and at a line
on its input reads the large one, alone: what is computed with a model takes memory of its own.
"""

import sys
from pathlib import Path

import torch

from mint_core.model import loading
from mint_core.model.float8.reading import Float8
from tests.models import load_base


def main(small: str, large: str, device: str, dtype: str) -> None:
    load_base(small, device=device, dtype="bfloat16")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    float8 = Float8(kept=True) if dtype == "float8" else None
    loading._read(Path(large), torch.device(device), torch.bfloat16, 0.0, float8)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
