"""Batches cut into messages and joined again, over a real channel."""

import itertools
import threading

import pytest

import mint
from mint import types
from mint._run.passes import merge_metrics
from tests.unit.mint.faulty_server import Code, Fault, Server

LIMIT_S = 20.0


def datum(first: int, length: int = 2) -> types.Datum:
    tokens = list(range(first, first + length))
    return types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": tokens})


def first_tokens(server: Server, sequence: int) -> list[int]:
    data = server.script.requests[sequence].data
    return [d.model_input.chunks[0].encoded_text.tokens[0] for d in data]


def test_a_batch_of_many_data_is_cut_and_joined(
    server: Server, training: mint.TrainingClient
) -> None:
    result = training.forward_backward([datum(i, i % 3 + 1) for i in range(250)]).result(LIMIT_S)
    training.optim_step().result(LIMIT_S)

    methods = [method for _, method in server.script.executed]
    sent = [first_tokens(server, n) for n in (1, 2, 3)]
    assert methods == ["ForwardBackward"] * 3 + ["OptimStep"]
    assert [len(tokens) for tokens in sent] == [100, 100, 50]
    assert list(itertools.chain(*sent)) == list(range(250))
    lengths = [len(output["logprobs"]) for output in result.loss_fn_outputs]
    assert lengths == [i % 3 + 1 for i in range(250)]
    assert result.metrics["loss:sum"] == 1 + 2 + 3
    assert result.metrics["tokens:sum"] == sum(lengths)
    assert server.script.requests[4].backward_count == 3


def test_a_batch_beyond_a_messages_size_is_cut(
    server: Server, training: mint.TrainingClient
) -> None:
    data = [datum(i, 30_000) for i in range(8)]  # some 330 KB each, and 1 MiB is the most

    result = training.forward(data).result(LIMIT_S)

    sizes = [len(first_tokens(server, n)) for n, _ in server.script.executed]
    assert sum(sizes) == 8
    assert max(sizes) == 3
    assert all(request.ByteSize() <= 1 << 20 for request in server.script.requests.values())
    assert len(result.loss_fn_outputs) == 8


def test_what_follows_a_cut_batch_takes_effect_after_all_of_it(
    server: Server, training: mint.TrainingClient
) -> None:
    gate = server.script.gates[1] = threading.Event()
    batch = training.forward_backward([datum(i) for i in range(201)])
    training.optim_step()
    after = training.forward_backward([datum(0)])
    gate.set()

    after.result(LIMIT_S)
    batch.result(LIMIT_S)
    methods = [method for _, method in server.script.executed]
    assert methods == ["ForwardBackward"] * 3 + ["OptimStep", "ForwardBackward"]


def test_an_error_in_a_later_message_names_the_datum_of_the_batch(
    server: Server, training: mint.TrainingClient
) -> None:
    words = "`data[3].loss_fn_inputs.weights` has nan"
    fault = Fault(Code.INVALID_ARGUMENT, "INVALID_REQUEST", words, executed=True)
    server.script.faults = {(2, 1): fault}

    with pytest.raises(mint.BadRequestError) as caught:
        training.forward_backward([datum(i) for i in range(250)]).result(LIMIT_S)

    assert str(caught.value) == "`data[103].loss_fn_inputs.weights` has nan"
    assert len(server.script.executed) == 3  # the other messages ran all the same


def test_nothing_is_sent_of_a_batch_with_a_bad_datum(
    server: Server, training: mint.TrainingClient
) -> None:
    with pytest.raises(mint.BadRequestError, match=r"data\[150\]"):
        training.forward_backward([*(datum(i) for i in range(150)), "text"])  # type: ignore[list-item]
    training.forward_backward([datum(1)])
    training.optim_step().result(LIMIT_S)

    assert [method for _, method in server.script.executed] == ["ForwardBackward", "OptimStep"]
    assert server.script.requests[2].backward_count == 1  # what raised at once is none


def test_metrics_merge_as_their_suffixes_say() -> None:
    parts = [
        {"a:sum": 1.0, "b:mean": 2.0, "c:min": 3.0, "d:max": 4.0, "e:odd": 5.0, "f:sum": 1.0},
        {"a:sum": 10.0, "b:mean": 6.0, "c:min": 1.0, "d:max": 9.0, "e:odd": 5.0},
    ]

    assert merge_metrics(parts, [3, 1]) == {"a:sum": 11, "b:mean": 3, "c:min": 1, "d:max": 9}
    assert merge_metrics(parts[:1], [3]) == parts[0]


def test_tokens_per_second_are_those_of_all_messages(training: mint.TrainingClient) -> None:
    metrics = training.forward([datum(i) for i in range(250)]).result(LIMIT_S).metrics

    assert metrics["tokens:sum"] == 500
    assert 500 / LIMIT_S < metrics["tokens_per_second:mean"] < 1e7
