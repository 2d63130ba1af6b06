"""How scripts use the client: from notebooks, threads, and many calls at once."""

import ast
import asyncio
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mint
from mint import types
from tests.unit.mint.faulty_server import Server

LIMIT_S = 60.0
PROMPT = types.ModelInput.from_ints([1, 2, 3])
Data = list[types.Datum]

# Cells of a notebook, with blocking calls and awaits in turn.
CELLS = [
    "service = mint.ServiceClient(base_url=address)",
    "training = service.create_lora_training_client()",
    "first = training.forward_backward(data).result()",
    "second = await training.forward_backward(data)",
    "step = await (await training.optim_step_async(types.AdamParams()))",
    "sampling = await service.create_sampling_client_async()",
    "samples = sampling.sample(PROMPT, 2).sequences",
    "more = await asyncio.gather(*[sampling.sample_async(PROMPT, 1) for _ in range(5)])",
    "training.forward_backward_custom(data, lambda d, lp: (lp[0].sum(), {})).result()",
]


def test_cells_of_a_notebook_run_while_its_loop_runs(server: Server, data: Data) -> None:
    names: dict[str, Any] = dict(globals(), address=server.address, data=data)

    async def notebook() -> None:
        for cell in CELLS:
            code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            running = eval(code, names)
            if inspect.iscoroutine(running):
                await running

    asyncio.run(notebook())

    names["service"].close()
    assert len(names["samples"]) == 2
    assert len(names["more"]) == 5
    methods = [method for _, method in server.script.executed]
    assert methods == ["ForwardBackward"] * 2 + ["OptimStep", "Forward", "ForwardBackward"]


async def test_five_hundred_samples_are_gathered(
    server: Server, sampling: mint.SamplingClient
) -> None:
    calls = [
        sampling.sample_async(PROMPT, 1, types.SamplingParams(max_tokens=4, seed=seed))
        for seed in range(500)
    ]

    responses = await asyncio.wait_for(asyncio.gather(*calls), LIMIT_S)

    assert [response.seed for response in responses] == list(range(500))
    assert len(server.sampler.requests) == 500


def test_threads_share_a_client(server: Server, training: mint.TrainingClient, data: Data) -> None:
    ready = threading.Barrier(8, timeout=LIMIT_S)

    def work(_: int) -> int:
        ready.wait()
        for _ in range(25):
            training.forward_backward(data)
        return len(training.forward(data).result(LIMIT_S).loss_fn_outputs)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [1] * 8
    training.optim_step().result(LIMIT_S)

    sequences = [sequence for sequence, _ in server.script.executed]
    assert sequences == list(range(1, 8 * 26 + 2))
    assert server.script.requests[8 * 26 + 1].backward_count == 200


def test_event_loops_in_threads_share_a_client(sampling: mint.SamplingClient) -> None:
    async def several() -> int:
        responses = await asyncio.gather(*[sampling.sample_async(PROMPT, 1) for _ in range(20)])
        return len(responses)

    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(asyncio.run, several()) for _ in range(4)]
        assert [wait.result(LIMIT_S) for wait in waits] == [20] * 4


async def test_a_future_offers_what_tasks_want(training: mint.TrainingClient, data: Data) -> None:
    future = training.forward(data)

    output = await asyncio.create_task(future.coroutine())

    assert future.future().result(0) is output
