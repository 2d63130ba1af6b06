"""A cluster of Ray on this machine, for tests: several nodes, each with its own processes."""

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from mint_core.engine_host.carried import NO_FILES, FilesOf
from mint_core.engine_host.host import EngineHost
from mint_core.engine_host.on_ray.host import RayHosts
from mint_core.engine_host.on_ray.options import RayOptions

STORE_BYTES = 80 * 2**20  # nothing of ours goes through Ray's own store: its least
NODE_CPUS = 4


@contextmanager
def running_cluster(head_cpus: int = NODE_CPUS, more_nodes: int = 1) -> Iterator[Any]:
    """A head, and nodes beside it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: `make test-ray` installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(
            num_cpus=head_cpus, include_dashboard=False, object_store_memory=STORE_BYTES
        )
        for _ in range(more_nodes):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES)


class RayPlaces:
    """Places for engines in a cluster, by one driver, which lives as long as this."""

    def __init__(self, cluster: Any, files: FilesOf = lambda job: NO_FILES, **options: Any) -> None:
        self.cluster = cluster
        self.hosts = RayHosts(RayOptions(address=cluster.address, **options), files)
        self._held = self.hosts.place(10**6)
        self._numbers = itertools.count()

    def next(self) -> EngineHost:
        return self.hosts.place(next(self._numbers))

    async def close(self) -> None:
        await self._held.close()


def agent_of(engine: psutil.Process) -> psutil.Process:
    """The actor beside an engine."""
    agent = engine.parent()
    assert agent is not None
    assert "EngineAgent" in " ".join(agent.cmdline())
    return agent


def is_on_node(process: psutil.Process) -> bool:
    """Whether it is an engine, and an actor's child."""
    try:
        return bool(agent_of(process))
    except (psutil.Error, AssertionError):
        return False


def engines_of(module: str) -> list[psutil.Process]:
    """The engines of a module that are actors' children."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if f"{module}.engine" in each.cmdline() and is_on_node(each):
                found.append(each)
    return found


def engines_behind(front: psutil.Process) -> list[psutil.Process]:
    """The engines that a front has on the nodes: their actors are connected with its driver."""
    ports = {
        each.laddr.port
        for child in front.children()
        for each in child.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }
    found = []
    for engine in psutil.process_iter():
        with suppress(psutil.Error, AssertionError):
            agent = agent_of(engine)
            if any(
                each.raddr and each.raddr.port in ports for each in agent.net_connections("tcp")
            ):
                found.append(engine)
    return found


def kill_node_of(cluster: Any, engine: psutil.Process) -> None:
    """Ends the node on which an engine runs, as the loss of its machine would, but not the head."""
    raylet = agent_of(engine).parent()
    assert raylet is not None
    for node in cluster.list_all_nodes():
        if node.all_processes["raylet"][0].process.pid == raylet.pid:
            assert node is not cluster.head_node, "the head is not to be lost"
            cluster.remove_node(node, allow_graceful=False)
            return
    raise AssertionError("the engine runs on no node")
