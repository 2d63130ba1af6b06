"""Does one client process stay flat? 50 runs train and 500 samples are under way in it at all times
for ten minutes, on real services with a tiny model; its memory, threads and file descriptors, and
those of the services, are looked at every ten seconds.

    python -m benchmarks.one_client [--minutes 10] [--runs 50] [--samples 500]

Status 1 if anything grew after the first fifth of the time, or a caller got no answer.
"""

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import mint
from benchmarks.trainer_fairness import some
from mint import types
from tests.models import tiny_qwen3
from tests.servers import running_sampler, running_trainer

PERIOD_S = 10.0
ANSWER_LIMIT_S = 120.0  # longer without an answer is a hang
WARM_UP_SHARE = 0.2
MOST_GROWTH = 0.03  # of memory: a leak of a kilobyte per call would be several times that
MORE_THREADS = 3  # of pools that were not full yet
ADAM = types.AdamParams(learning_rate=1e-4)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a process and its children."""

    memory_mib: float  # its own and shared: a leak is in one of these
    files_mib: float  # pages of programs and libraries: the system takes them and brings them back
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> "Sizes":
        parent = psutil.Process(pid)
        family = [parent, *parent.children()]
        kinds = [_resident_mib(p.pid) for p in family]
        return cls(
            sum(kind["RssAnon"] + kind["RssShmem"] for kind in kinds),
            sum(kind["RssFile"] for kind in kinds),
            sum(p.num_threads() for p in family),
            sum(p.num_fds() for p in family),
        )


def _resident_mib(pid: int) -> dict[str, float]:
    """The kinds of memory that Linux tells of a process: RssAnon, RssFile, RssShmem."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        name: int(size.split()[0]) / 1024
        for name, size in (line.split(":", 1) for line in lines)
        if name.startswith("Rss")
    }


@dataclass
class Watch:
    """What was seen of the processes, by name."""

    pids: dict[str, int]
    seen: dict[str, list[Sizes]] = field(default_factory=dict)

    async def look(self) -> None:
        while True:
            gc.collect()  # what waits to be collected is no leak
            for name, pid in self.pids.items():
                self.seen.setdefault(name, []).append(Sizes.of(pid))
            await asyncio.sleep(PERIOD_S)

    def grown(self) -> Iterator[str]:
        """A line per process, and one for each of its sizes that grew."""
        for name, sizes in self.seen.items():
            settled = sizes[int(len(sizes) * WARM_UP_SHARE) :]
            third = max(1, len(settled) // 3)
            first, last = settled[:third], settled[-third:]
            for size in ("memory_mib", "files_mib", "threads", "descriptors"):
                before, after = _median(first, size), _median(last, size)
                print(f"{name}: {size} {before:.0f} at first, {after:.0f} at last")
                more = {"memory_mib": MOST_GROWTH * before, "threads": MORE_THREADS}
                if size != "files_mib" and after > before + more.get(size, 0):
                    every = " ".join(f"{getattr(each, size):.0f}" for each in sizes)
                    yield f"{name}: {size} grew from {before:.0f} to {after:.0f}: {every}"


def _median(sizes: Sequence[Sizes], name: str) -> float:
    values: list[float] = [getattr(each, name) for each in sizes]
    return statistics.median(values)


async def train(client: mint.TrainingClient, seed: int, until_s: float) -> int:
    """Steps taken until then."""
    data, steps = some(128, seed), 0
    while time.monotonic() < until_s:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            computed = await client.forward_backward_async(data)
            stepped = await client.optim_step_async(ADAM)
            await computed
            await stepped
        steps += 1
    return steps


async def sample(client: mint.SamplingClient, seed: int, until_s: float) -> int:
    """Samples drawn until then."""
    prompt, drawn = types.ModelInput.from_ints([5 + seed % 50, 7]), 0
    while time.monotonic() < until_s:
        params = types.SamplingParams(max_tokens=8, seed=drawn)
        async with asyncio.timeout(ANSWER_LIMIT_S):
            await client.sample_async(prompt, 1, params)
        drawn += 1
    return drawn


async def keep_busy(
    trainings: Sequence[mint.TrainingClient],
    samplers: Sequence[mint.SamplingClient],
    samples: int,
    watch: Watch,
    seconds: float,
) -> tuple[list[int], list[int]]:
    """Calls answered, by run and by sampling task."""
    until_s = time.monotonic() + seconds
    looking = asyncio.create_task(watch.look())
    done = await asyncio.gather(
        *(train(client, seed, until_s) for seed, client in enumerate(trainings)),
        *(sample(samplers[seed % len(samplers)], seed, until_s) for seed in range(samples)),
    )
    looking.cancel()
    return done[: len(trainings)], done[len(trainings) :]


@contextmanager
def clients(runs: int) -> Iterator[tuple[list[mint.TrainingClient], dict[str, int]]]:
    """Runs of one client, and the processes to watch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_qwen3(folder / "model")
        store = folder / "store"
        with (
            running_sampler(model, store) as sampler,
            running_trainer(model, store, sampler_address=sampler.address) as trainer,
            mint.ServiceClient(base_url=trainer.address) as service,
        ):
            made = [service.create_lora_training_client(rank=8, seed=i) for i in range(runs)]
            pids = {
                "client": psutil.Process().pid,
                "trainer": trainer.process.pid,
                "sampler": sampler.process.pid,
            }
            yield made, pids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--samples", type=int, default=500)
    given = parser.parse_args()
    with clients(given.runs) as (trainings, pids):
        watch = Watch(pids)
        samplers = [each.save_weights_and_get_sampling_client() for each in trainings[:8]]
        steps, drawn = asyncio.run(
            keep_busy(trainings, samplers, given.samples, watch, given.minutes * 60)
        )
    print(f"steps: {sum(steps)}, {min(steps)} to {max(steps)} a run")
    print(f"samples: {sum(drawn)}, {min(drawn)} to {max(drawn)} a task")
    grown = list(watch.grown())
    for line in grown:
        print("error:", line, file=sys.stderr)
    return 1 if grown or not min(steps + drawn) else 0


if __name__ == "__main__":
    sys.exit(main())
