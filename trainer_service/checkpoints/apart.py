"""Work on checkpoints in a process of its own, which ends with it: what takes a model's memory, or
reads a stranger's arrays. Both sides of it are here.
"""

import asyncio
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mint_core.engine_host.pipe import ModelDescription, die_with_the_front
from mint_core.errors import EngineFault, MintError
from mint_core.lora.spec import AdapterSpec

LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Answer: whether the head was tied in the base model. The output folder then holds
    configuration and weights.
    """

    base_folder: str
    adapter_folder: str  # of a checkpoint
    spec: AdapterSpec
    output_folder: str  # exists and is empty
    dtype: str  # "float32", "bfloat16", "float16"; empty: the base model's own
    threads: int
    float8: bool = False  # whether the adapter was trained on float8 weights of the base


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Answer: `AdapterSpec`, step, and the files of a checkpoint by name, which the output folder
    then holds.
    """

    folder: str  # of the files as they came
    output_folder: str  # exists and is empty
    model: ModelDescription
    base_model: str  # stands for what the configuration says; empty: nothing does


async def do_apart(module: str, job: Merge | Convert) -> Any:
    """Has `python -m <module>` do a job. Raises what keeps it from its end."""
    what = type(job).__name__.lower()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # the devices are the engine's
        process_group=0,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            answer, _ = await process.communicate(pickle.dumps(job))
    except TimeoutError:
        raise EngineFault(f"the {what} took more than {LIMIT_S:.0f} s and was ended") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if not answer:
        raise EngineFault(
            f"the {what} ended with exit code {process.returncode}; the server's log says why"
        )
    outcome = pickle.loads(answer)
    if isinstance(outcome, MintError):
        raise outcome
    return outcome


def answer_once(do: Callable[[Any], object]) -> None:
    """Reads a job from standard input and writes to standard output what comes of it."""
    die_with_the_front()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    job = pickle.load(sys.stdin.buffer)
    try:
        outcome = do(job)
    except MintError as error:
        outcome = error
    except Exception as error:
        traceback.print_exc()
        what = type(job).__name__.lower()
        outcome = EngineFault(
            f"the {what} failed with {type(error).__name__}; the server's log has the details"
        )
    with answers:
        pickle.dump(outcome, answers)
