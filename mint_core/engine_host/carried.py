"""Files that front and engine name to each other where they share no disk. The front's are the
ones that count: what a job reads is brought to the engine before the job, and what it has written
comes back before its answer is believed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mint_core.errors import EngineFault, MintError

# Names, to an engine, the folder under which it has the front's paths. Unset: they are its own.
ROOT_VARIABLE = "MINT_FRONT_FILES"


def here(path: str | Path) -> Path:
    """Where an engine has what its front names."""
    root = os.environ.get(ROOT_VARIABLE)
    return beneath(root, path) if root else Path(path)


def beneath(root: str | Path, path: str | Path) -> Path:
    """The place of a front's path in a folder."""
    inner = Path(path).relative_to(Path(path).anchor)
    if ".." in inner.parts:
        raise ValueError(f"{path} leads out of its folder")
    return Path(root) / inner


def unwritten(error: OSError) -> MintError:
    """What is said of a file that did not come back, unless a job has words of its own."""
    return EngineFault(f"what the engine wrote could not be fetched: {error.strerror}")


class JobFiles(NamedTuple):
    """What a job reads and what it writes, by the front's paths."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    refusal: Callable[[OSError], MintError] = unwritten  # what a job says of a full disk


NO_FILES = JobFiles()
FilesOf = Callable[[object], JobFiles]  # of a job
