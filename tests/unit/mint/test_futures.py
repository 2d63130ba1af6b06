"""What a future promises: waits, awaits, cancelling, signals, exit."""

import asyncio
import concurrent.futures
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

import mint
from mint import types
from mint.futures import APIFuture
from tests.unit.mint.faulty_server import Server

Data = list[types.Datum]
LIMIT_S = 20.0
PROMPT = types.ModelInput.from_ints([1, 2, 3])
ENDLESS = types.SamplingParams(max_tokens=13)  # the server holds it until it is cancelled


def later(future: APIFuture[str], value: str = "done") -> threading.Timer:
    timer = threading.Timer(0.05, future.succeed, [value])
    timer.start()
    return timer


def test_a_timeout_is_both_kinds_and_leaves_the_call_alone() -> None:
    future: APIFuture[str] = APIFuture()

    with pytest.raises(mint.APITimeoutError) as caught:
        future.result(timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(mint.APITimeoutError):
        future.exception(timeout=0.01)
    later(future)
    assert future.result(LIMIT_S) == "done"


def test_a_calls_own_timeout_error_is_raised_as_it_is() -> None:
    future: APIFuture[str] = APIFuture()
    own = mint.APITimeoutError("no server answered")
    future.fail(own)

    with pytest.raises(mint.APITimeoutError) as caught:
        future.result(1)
    assert caught.value is own


def test_a_training_call_cannot_be_cancelled() -> None:
    future: APIFuture[str] = APIFuture()

    assert future.running()
    assert not future.cancel()


def test_standard_tools_work() -> None:
    futures: list[APIFuture[str]] = [APIFuture() for _ in range(3)]
    for future in futures:
        later(future)

    done = list(concurrent.futures.as_completed(futures, LIMIT_S))

    assert set(done) == set(futures)


def test_awaiting_works_on_one_loop_after_another_and_in_threads() -> None:
    async def wait(future: APIFuture[str]) -> str:
        return await future

    for _ in range(2):
        future: APIFuture[str] = APIFuture()
        later(future)
        assert asyncio.run(wait(future)) == "done"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = APIFuture()
        later(future)
        waits = [pool.submit(asyncio.run, wait(future)) for _ in range(3)]
        assert [each.result(LIMIT_S) for each in waits] == ["done"] * 3


async def test_abandoning_the_await_of_a_training_call_leaves_it_running() -> None:
    future: APIFuture[str] = APIFuture()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(future, 0.01)
    with pytest.raises(mint.APITimeoutError):
        await future.result_async(0.01)
    assert not future.done()
    later(future)
    assert await future.result_async(LIMIT_S) == "done"


def test_an_outcome_after_the_loop_has_closed_disturbs_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future: APIFuture[str] = APIFuture()

    async def abandon() -> None:
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(abandon())
    future.succeed("late")

    assert future.result(0) == "late"
    assert not caplog.records


async def test_training_names_take_a_second_await(
    training: mint.TrainingClient, data: Data
) -> None:
    future = await training.forward_backward_async(data)
    output = await future
    again = await (await training.forward_backward_async(data, loss_fn="cross_entropy"))
    step = await (await training.optim_step_async(types.AdamParams())).result_async()

    assert (output.metrics["loss:sum"], again.metrics["loss:sum"]) == (1.0, 2.0)
    assert not hasattr(output, "result")
    assert isinstance(step, types.OptimStepResponse)


async def test_async_names_in_tasks_keep_program_order(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    names: list[Coroutine[Any, Any, Any]] = []
    for _ in range(3):
        names += [training.forward_backward_async(data), training.optim_step_async()]
    futures = await asyncio.gather(*names)
    await asyncio.gather(*futures)

    methods = [method for _, method in server.script.executed]
    assert methods == ["ForwardBackward", "OptimStep"] * 3


async def test_creating_and_sampling_names_take_one_await(service: mint.ServiceClient) -> None:
    training = await service.create_lora_training_client_async(base_model="base", rank=4)
    sampling = await service.create_sampling_client_async(model_path="mint://r/sampler_weights/a")
    response = await sampling.sample_async(
        prompt=PROMPT, num_samples=2, sampling_params=types.SamplingParams(max_tokens=2)
    )
    logprobs = await sampling.compute_logprobs_async(PROMPT)

    assert isinstance(training, mint.TrainingClient)
    assert not hasattr(sampling, "result")
    assert len(response.sequences) == 2
    assert logprobs == [None, -1.0, -1.0]
    assert (await training.get_info_async()).model_data.model_name == "base"


def test_blocking_inside_a_coroutine_does_not_deadlock(sampling: mint.SamplingClient) -> None:
    async def block() -> int:
        return len(sampling.sample(PROMPT, 1).result(LIMIT_S).sequences)

    assert asyncio.run(block()) == 1
    assert asyncio.run(block()) == 1


def test_a_sample_future_has_its_responses_fields(sampling: mint.SamplingClient) -> None:
    samples = sampling.sample(prompt=PROMPT, num_samples=4, sampling_params=types.SamplingParams())

    assert isinstance(samples.sequences, list)
    assert [sequence.tokens for sequence in samples.sequences] == [[1, 2]] * 4
    assert samples.result().sequences == samples.sequences
    assert samples.seed == samples.result().seed
    assert not hasattr(samples.result(), "result")


def test_cancelling_a_sample_ends_its_rpc(server: Server, sampling: mint.SamplingClient) -> None:
    samples = sampling.sample(PROMPT, 1, ENDLESS)
    assert server.sampler.started.wait(LIMIT_S)

    assert samples.cancel()
    assert server.sampler.cancelled.wait(LIMIT_S)
    with pytest.raises(concurrent.futures.CancelledError):
        samples.result(LIMIT_S)


async def test_cancelling_the_await_of_a_sample_ends_its_rpc(
    server: Server, sampling: mint.SamplingClient
) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sampling.sample_async(PROMPT, 1, ENDLESS), 0.2)

    assert await asyncio.to_thread(server.sampler.cancelled.wait, LIMIT_S)


async def test_a_sample_cancelled_elsewhere_is_cancelled_for_who_awaits(
    server: Server, sampling: mint.SamplingClient
) -> None:
    samples = sampling.sample(PROMPT, 1, ENDLESS)
    waiting = asyncio.ensure_future(samples)
    assert await asyncio.to_thread(server.sampler.started.wait, LIMIT_S)
    samples.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting


INTERRUPTED = """
import signal, sys
from mint.futures import APIFuture
def stop(*_): raise InterruptedError("alarm")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
if sys.argv[1] == "SIGALRM":
    signal.signal(signal.SIGALRM, stop)
print("waiting", flush=True)
try:
    APIFuture().result(*([60] if sys.argv[2] == "timeout" else []))
except (KeyboardInterrupt, InterruptedError) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("wait", ["endless", "timeout"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGALRM"])
def test_waits_are_interruptible(name: str, wait: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, name, wait], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)  # nothing tells that the wait itself has begun
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=LIMIT_S)

    assert output.strip() in ("KeyboardInterrupt", "InterruptedError")


@pytest.mark.parametrize("timeout", [None, LIMIT_S])
def test_a_signal_that_another_thread_received_interrupts_a_wait(timeout: float | None) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError("alarm")

    def receive() -> None:
        time.sleep(0.2)  # as in the test before
        signal.pthread_kill(threading.get_ident(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, stop)
    future: APIFuture[str] = APIFuture()
    late = threading.Timer(5.0, future.succeed, ["too late"])
    late.start()
    receiver = threading.Thread(target=receive)
    try:
        receiver.start()
        with pytest.raises(InterruptedError):
            future.result(timeout)
        assert not future.done()
    finally:
        late.cancel()
        receiver.join()
        signal.signal(signal.SIGALRM, before)


LEFT_PENDING = """
import sys, mint
from mint import types
service = mint.ServiceClient(base_url=sys.argv[1])
training = service.create_lora_training_client()
training.forward_backward([types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})])
service.create_sampling_client().sample(
    types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=13)
)
print("over")
"""


def test_calls_under_way_do_not_keep_the_process_alive(server: Server) -> None:
    server.script.gates[1] = threading.Event()

    done = subprocess.run(
        [sys.executable, "-c", LEFT_PENDING, server.address],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )

    assert (done.stdout, done.stderr) == ("over\n", "")
