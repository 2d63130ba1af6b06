"""What refused calls leave in circles is gone soon if it is large."""

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from mint_core.rpc import garbage
from mint_core.rpc.garbage import COLLECT_BYTES, NOTICED_BYTES, Garbage


class Circle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def no_collection_by_number() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def test_what_is_large_is_looked_for_at_once_and_once_more_behind_the_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "LATER_S", 0.01)
    left = Garbage()
    small, large, late = Circle(), Circle(), Circle()
    seen = [weakref.ref(each) for each in (small, large, late)]

    del small
    left.left(COLLECT_BYTES - 1)
    assert seen[0]() is not None
    del large
    left.left(1)
    assert [each() is None for each in seen] == [True, True, False]
    del late
    await asyncio.sleep(0.1)
    assert seen[2]() is None


async def test_what_is_noticed_at_all_is_gone_soon_though_nothing_more_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "LATER_S", 0.01)
    left, circle = Garbage(), Circle()
    seen = weakref.ref(circle)
    del circle
    left.left(NOTICED_BYTES - 1)
    await asyncio.sleep(0.1)
    assert seen() is not None
    left.left(1)
    await asyncio.sleep(0.1)
    assert seen() is None


THREADS_THAT_LET_GO = """
import sys
from threading import Barrier, Thread
from mint_core.rpc.garbage import give_back_what_is_freed
def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
def work():
    for _ in range(3):
        held = [b"x" * (2**19 - 100) for _ in range(60)]
        del held
    done.wait()
    done.wait()
if sys.argv[1] == "told":
    give_back_what_is_freed()
large = b"x" * (2**25 - 5000)
del large
before, done = resident_mib(), Barrier(5)
threads = [Thread(target=work) for _ in range(4)]
for each in threads:
    each.start()
done.wait()
print(resident_mib() - before)
done.wait()
"""


def grown_mib(told: str) -> int:
    command = [sys.executable, "-c", THREADS_THAT_LET_GO, told]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's C library")
def test_threads_that_let_go_of_large_blocks_keep_little() -> None:
    assert grown_mib("untold") > 60  # or the test shows nothing
    assert grown_mib("told") < 20
