"""The client's verbs against real services: names of all kinds, runs as a user manages them."""

import asyncio
import json
import re
from datetime import timedelta

import numpy as np
import pytest

import mint
from mint import types

LIMIT_S = 60.0
PROMPT = types.ModelInput.from_ints([5, 6, 7])


def batch() -> list[types.Datum]:
    inputs = {"target_tokens": [6, 7, 8], "weights": [0, 1, 1]}
    return [types.Datum(model_input=PROMPT, loss_fn_inputs=inputs)]


@pytest.fixture
def run(service: mint.ServiceClient) -> mint.TrainingClient:
    return service.create_lora_training_client(rank=8, seed=1, user_metadata={"test": "client"})


def logprobs(run: mint.TrainingClient) -> list[float]:
    output = run.forward(batch()).result(LIMIT_S)
    return [float(value) for value in output.loss_fn_outputs[0]["logprobs"].tolist()]


def test_a_run_is_kept_as_long_as_it_was_asked_for(service: mint.ServiceClient) -> None:
    assert "retention" in service.get_server_capabilities().features
    run = service.create_lora_training_client(rank=8, retention=timedelta(hours=1))
    path = run.save_state("kept").result(LIMIT_S).path
    service.create_training_client_from_state(path, retention=timedelta(seconds=90))
    too_long = timedelta(days=10**5)  # the server refuses it, so it has read it
    with pytest.raises(mint.APIError, match="`retention` is"):
        service.create_lora_training_client(retention=too_long)
    with pytest.raises(mint.APIError, match="`retention` is"):
        service.create_training_client_from_state(path, retention=too_long)

    for wrong in (timedelta(0), 5):
        with pytest.raises(mint.InvalidInputError, match="positive datetime"):
            service.create_lora_training_client(retention=wrong)  # type: ignore[arg-type]


def test_an_isolated_run_says_so_and_computes_the_same(
    service: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    assert "isolated" in service.get_server_capabilities().features
    isolated = service.create_lora_training_client(rank=8, seed=1, isolated=True)
    for each in (run, isolated):
        each.forward_backward(batch())
        each.optim_step(types.AdamParams(learning_rate=1e-2)).result(LIMIT_S)
    assert logprobs(isolated) == logprobs(run)
    path = isolated.save_state("isolated").result(LIMIT_S).path
    for make in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        continued = make(path, isolated=True)
        assert service.get_training_run(continued.training_run_id).isolated
    assert service.get_training_run(isolated.training_run_id).isolated
    assert not service.get_training_run(run.training_run_id).isolated


async def test_a_loop_of_async_names(service: mint.ServiceClient) -> None:
    run = await service.create_lora_training_client_async(rank=8, seed=1)
    for _ in range(2):
        backward = await run.forward_backward_async(batch(), loss_fn="cross_entropy")
        step = await run.optim_step_async(types.AdamParams(learning_rate=1e-2))
        assert (await backward).metrics["loss:sum"] > 0
        last = await step
    sampling = await run.save_weights_and_get_sampling_client_async(name="eval")
    again = await run.save_weights_and_get_sampling_client_async(name="eval")
    params = types.SamplingParams(max_tokens=4)
    responses = await asyncio.gather(
        *(sampling.sample_async(prompt=PROMPT, num_samples=2, sampling_params=params),) * 8
    )

    assert last.step == 2
    assert sampling.model_path != again.model_path
    for response in responses:
        assert [len(sequence.tokens) <= 4 for sequence in response.sequences] == [True, True]
        assert {entry.revision_path for entry in response.sequences} == {sampling.model_path}


async def test_a_cancelled_sample_leaves_the_sampler_free(run: mint.TrainingClient) -> None:
    sampling = await run.save_weights_and_get_sampling_client_async()
    endless = types.SamplingParams(max_tokens=4_000, stop=[])

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sampling.sample_async(PROMPT, 64, endless), 0.5)
    short = sampling.sample_async(PROMPT, 1, types.SamplingParams(max_tokens=2))
    assert len((await asyncio.wait_for(short, LIMIT_S)).sequences) == 1


def test_prompt_logprobs_come_as_lists(run: mint.TrainingClient) -> None:
    sampling = run.save_weights_and_get_sampling_client()
    response = sampling.sample(
        PROMPT,
        1,
        types.SamplingParams(max_tokens=1, temperature=0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=types.TensorData([[5, -1], [6, 7]]),
        prompt_alt_tokens_k=4,
    ).result(LIMIT_S)

    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs == sampling.compute_logprobs(PROMPT).result(LIMIT_S)
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1:] == pytest.approx(logprobs(run)[:-1], rel=1e-5, abs=1e-5)
    assert response.topk_prompt_logprobs is not None
    assert [entry and len(entry) for entry in response.topk_prompt_logprobs] == [None, 2, 2]
    assert response.target_prompt_logprobs is not None
    assert np.isnan(response.target_prompt_logprobs.to_numpy()).tolist() == [
        [False, True],
        [False, False],
    ]
    assert response.sequences[0].topk_logprobs is not None
    assert response.sequences[0].tokens[0] == response.sequences[0].topk_logprobs[0][0][0]
    alternatives = response.prompt_alt_tokens
    assert alternatives is not None
    targets = types.TensorData(alternatives.tokens)
    scored = sampling.sample(PROMPT, target_prompt_logprobs=targets).target_prompt_logprobs
    assert scored is not None
    assert alternatives.logprobs.shape == (2, 4)
    assert alternatives.logprobs == pytest.approx(scored.to_numpy(), rel=1e-5, abs=1e-5)
    last = sampling.compute_logprobs(PROMPT, prompt_logprobs_last_n=1).result(LIMIT_S)
    assert last == [None, None, response.prompt_logprobs[2]]
    with pytest.raises(mint.BadRequestError, match="prompt_logprobs_last_n"):
        sampling.compute_logprobs(PROMPT, 0)
    with pytest.raises(mint.BadRequestError, match="target_prompt_logprobs"):
        sampling.sample(PROMPT, target_prompt_logprobs=types.TensorData([[0.5], [0.5]]))


def test_samples_follow_a_regex_or_a_schema(run: mint.TrainingClient) -> None:
    sampling = run.save_weights_and_get_sampling_client()
    tokenizer = sampling.get_tokenizer()
    regex = "[0-9]{3}-[a-c]{2}"
    params = types.SamplingParams(max_tokens=60, seed=1, regex=regex)
    sequences = sampling.sample(PROMPT, 3, params).result(LIMIT_S).sequences
    assert {sequence.stop_reason for sequence in sequences} == {"stop"}
    texts = [tokenizer.decode(sequence.tokens[:-1]) for sequence in sequences]
    assert all(re.fullmatch(regex, text) for text in texts)
    parts = list(sampling.sample_stream(PROMPT, 1, params))
    assert [token for part in parts for token in part.tokens] == sequences[0].tokens

    colours = types.SamplingParams(max_tokens=60, json_schema={"enum": ["red", "green"]})
    (sequence,) = sampling.sample(PROMPT, 1, colours).result(LIMIT_S).sequences
    assert json.loads(tokenizer.decode(sequence.tokens[:-1])) in ("red", "green")
    with pytest.raises(mint.BadRequestError, match=r"sampling_params\.regex.*unclosed group"):
        sampling.sample(PROMPT, 1, types.SamplingParams(regex="(")).result(LIMIT_S)


def test_a_client_in_flight_follows_the_newest_weights_and_a_snapshot_does_not(
    run: mint.TrainingClient,
) -> None:
    snapshot = run.save_weights_and_get_sampling_client()
    follows = run.save_weights_and_get_sampling_client(kind="inflight")
    before = follows.compute_logprobs(PROMPT).result(LIMIT_S)
    run.forward_backward(batch())
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    second = run.save_weights_and_get_sampling_client(kind="inflight")

    now = [client.compute_logprobs(PROMPT).result(LIMIT_S) for client in (follows, second)]
    assert snapshot.compute_logprobs(PROMPT).result(LIMIT_S) == before
    assert now[0] == now[1] != before
    revision = follows.sample(PROMPT, 1).result(LIMIT_S).sequences[0].revision_path
    assert revision.startswith(f"{follows.model_path}@")
    with pytest.raises(mint.InvalidInputError, match="`kind` is 'other'"):
        run.save_weights_and_get_sampling_client(kind="other")  # type: ignore[arg-type]


def test_a_seed_repeats(run: mint.TrainingClient) -> None:
    sampling = run.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=8, temperature=1.0)
    first = sampling.sample(PROMPT, 2, params).result(LIMIT_S)

    again = sampling.sample(PROMPT, 2, params.model_copy(update={"seed": first.seed}))

    assert again.result(LIMIT_S).sequences == first.sequences


def test_state_is_saved_loaded_and_continued(
    service: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    run.forward_backward(batch())
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    saved = run.save_state("one", ttl_seconds=3600).result(LIMIT_S)
    trained = logprobs(run)
    with pytest.raises(mint.ConflictError, match="overwrite"):
        run.save_state("one").result(LIMIT_S)
    copy = service.create_training_client_from_state_with_optimizer(saved.path)
    fresh = service.create_training_client_from_state(saved.revision_path)
    run.forward_backward(batch())
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    loaded = run.load_state_with_optimizer(saved.path).result(LIMIT_S)

    assert logprobs(run) == logprobs(copy) == logprobs(fresh) == trained
    assert (copy.training_run.step, fresh.training_run.step, loaded.step) == (1, 0, 1)
    assert copy.training_run.lora_config == run.training_run.lora_config


def test_runs_are_listed_changed_and_deleted(
    service: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    service.update_training_run(run.training_run_id, {"mine": run.training_run_id})
    listed = service.list_training_runs(metadata_filter={"mine": run.training_run_id})
    info = run.get_info()
    service.delete_training_run(run.training_run_id)

    assert [each.training_run_id for each in listed.training_runs] == [run.model_id]
    assert (info.model_data.model_name, info.lora_rank) == ("Qwen/Qwen3-0.6B", 8)
    with pytest.raises(mint.NotFoundError, match=run.training_run_id):
        run.forward(batch()).result(LIMIT_S)
    with pytest.raises(mint.NotFoundError):
        service.get_training_run(run.training_run_id)


def test_pages_hold_all_runs_once(service: mint.ServiceClient) -> None:
    made = [
        service.create_lora_training_client(rank=1, user_metadata={"pages": "yes"}).model_id
        for _ in range(3)
    ]
    seen: list[str] = []
    token = ""
    while True:
        page = service.list_training_runs(2, token, {"pages": "yes"})
        seen += [each.training_run_id for each in page.training_runs]
        token = page.next_page_token
        if not token:
            break

    assert seen == made[::-1]
