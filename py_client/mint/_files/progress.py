"""How far a transfer is: told to the caller, or shown by tqdm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mint.errors import refused

Progress = Callable[[int, int], None]  # is given bytes done and bytes in all
Report = Callable[[int], None]  # is given bytes done


@contextmanager
def reporting(progress: Progress | bool, total_bytes: int, what: str) -> Iterator[Report]:
    """What to call after each piece."""
    if progress is False:
        yield lambda done: None
    elif progress is not True:
        yield lambda done: progress(done, total_bytes)
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what) as bar:
            yield lambda done: bar.update(done - bar.n)


def check_progress(progress: Progress | bool) -> None:
    """Refuses what cannot show progress, before anything is sent."""
    if not isinstance(progress, bool) and not callable(progress):
        raise refused(
            "progress",
            f"is {progress!r}; give a function of (bytes done, bytes in all), or True for a bar",
        )
    if progress is True and find_spec("tqdm") is None:
        raise refused(
            "progress",
            "is True and tqdm, which draws the bar, is not installed; install it, "
            "or give a function",
        )
