"""The real engines on nodes that share no folder with their fronts: the same bits as beside them,
whatever of it dies.
"""

from pathlib import Path
from typing import Any

import pytest

import mint
from mint import types
from tests.faults.test_three_ways import state_at
from tests.models import VOCABULARY_SIZE
from tests.ray_cluster import agent_of, engines_of, kill_node_of, running_cluster
from tests.servers import running_sampler
from tests.supervised import Supervised, supervised
from tests.training_load import LIMIT_S, train_all

pytestmark = pytest.mark.ray

USERS, STEPS = 3, 8


def killing(service: Supervised, cluster: Any) -> Any:
    """Kills the engine, its actor, its node and the front."""

    def node() -> None:
        for engine in engines_of("trainer_service"):
            kill_node_of(cluster, engine)

    kills = {
        3: lambda: [engine.kill() for engine in engines_of("trainer_service")],
        8: lambda: [agent_of(engine).kill() for engine in engines_of("trainer_service")],
        13: node,
        19: service.kill,
    }

    def kill(user: int, answers: int) -> None:
        if user == 0 and answers in kills:
            kills.pop(answers)()

    return kill


def sampled(address: str, path: str) -> Any:
    with mint.ServiceClient(base_url=address) as client:
        sampling = client.create_sampling_client(path)
        prompt = types.ModelInput.from_ints(list(range(20, 40)))
        params = types.SamplingParams(max_tokens=12, seed=3)
        answer = sampling.sample(prompt, num_samples=2, sampling_params=params).result(LIMIT_S)
        return [(each.tokens, each.logprobs) for each in answer.sequences]


def test_engines_on_nodes_give_the_bits_of_those_beside_the_front(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    flags = {"base_model": qwen3_folder, "base_model_name": "tiny", "device": "cpu"}
    trained = {**flags, "store": store, "max_batch_tokens": 256, "snapshot_s": 0.3}
    for folder in ("beside", "apart"):
        (tmp_path / folder).mkdir()
    with supervised("trainer_service", tmp_path / "beside", **trained) as service:
        undisturbed = train_all(service.address, USERS, STEPS, VOCABULARY_SIZE)
    with running_cluster(head_cpus=0, more_nodes=2) as cluster:
        on_ray = {
            "engines_on": "ray",
            "ray_address": cluster.address,
            "ray_folder": tmp_path / "node",
        }
        with supervised("trainer_service", tmp_path / "apart", **trained, **on_ray) as service:
            kill = killing(service, cluster)
            disturbed = train_all(service.address, USERS, STEPS, VOCABULARY_SIZE, kill)
            assert service.starts == 2, service.log_text()
            for (answers, path), (others, other) in zip(disturbed, undisturbed, strict=True):
                assert answers == others
                assert state_at(store, path) == state_at(store, other)
            with mint.ServiceClient(base_url=service.address) as client:
                run = client.create_training_client_from_state(disturbed[0][1])
                adapter = run.save_weights_for_sampler("apart").result(LIMIT_S).path
            log = service.log_text()
            assert log.count("actor or its machine was lost") >= 2
            assert "inexactly" not in log
        name = {"base_model_name": "tiny"}
        with running_sampler(qwen3_folder, store, **name, **on_ray) as sampler:
            apart = sampled(sampler.address, adapter)
        assert not engines_of("sampler_service")
    with running_sampler(qwen3_folder, store, **name) as sampler:
        assert sampled(sampler.address, adapter) == apart
