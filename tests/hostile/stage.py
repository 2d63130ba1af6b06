"""Both services with keys, and what is seen of their processes."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import psutil

import mint
from tests.authorities import Authority
from tests.hostile.attacks import Hostile
from tests.hostile.neighbour import Neighbour
from tests.keys import make_key
from tests.servers import RunningService, running_sampler, running_trainer
from tests.warm import children, words_of

MOST_MIB = 64  # by which a front may have grown
MOST_DESCRIPTORS = 20
CLOSING_S = 30.0  # from the end of connections to that of their descriptors


@dataclass(frozen=True, slots=True)
class Stage:
    services: tuple[RunningService, RunningService]
    hostile: Hostile
    neighbour: Neighbour
    honest: Neighbour  # another tenant, who only works much

    def fronts(self) -> list[psutil.Process]:
        return [psutil.Process(service.process.pid) for service in self.services]

    def engines(self) -> list[int]:
        """Their process ids: another is another engine."""
        found = [child for front in self.fronts() for child in children(front.pid)]
        # Not the process that makes tokens of texts, which is started when it is first asked.
        return [each.pid for each in found if "mint_core.text" not in words_of(each)]

    def descriptors(self) -> list[int]:
        return [front.num_fds() for front in self.fronts()]

    def resident_mib(self) -> list[int]:
        return [front.memory_info().rss >> 20 for front in self.fronts()]

    def logs(self) -> list[str]:
        return [service.log_text() for service in self.services]

    @contextmanager
    def unharmed(self, quiet: list[Any]) -> Iterator[None]:
        """Has the neighbour work meanwhile. Raises AssertionError where a number is not that of a
        quiet hour, or either service is not as it was.
        """
        engines, descriptors = self.engines(), self.descriptors()
        resident_mib, logs = self.resident_mib(), self.logs()
        seen: list[list[Any]] = []
        ended = threading.Event()

        def work() -> None:
            while not seen or not ended.is_set():
                seen.append(self.neighbour.work())

        neighbour = threading.Thread(target=work)
        neighbour.start()
        try:
            yield
        finally:
            ended.set()
            neighbour.join()
        assert seen
        assert all(each == quiet for each in seen)
        assert self.engines() == engines
        new = "".join(n[len(b) :] for n, b in zip(self.logs(), logs, strict=True))
        assert "code=INTERNAL" not in new
        assert "Traceback" not in new
        deadline_s = time.monotonic() + CLOSING_S
        while not _within(self.descriptors(), descriptors, MOST_DESCRIPTORS):
            assert time.monotonic() < deadline_s, (self.descriptors(), descriptors)
            time.sleep(0.1)
        assert _within(self.resident_mib(), resident_mib, MOST_MIB)


def _within(now: list[int], before: list[int], more: int) -> bool:
    return all(n <= b + more for n, b in zip(now, before, strict=True))


@contextmanager
def staged(
    model: Path, folder: Path, size: int, authority: Authority | None = None
) -> Iterator[Stage]:
    """`authority`: both speak TLS, by certificates of its."""
    keys = {tenant: make_key(tenant, folder / "keys") for tenant in ("bad", "good", "other")}
    root = make_key("root", folder / "keys", scopes=frozenset({"admin"}))
    flags: dict[str, object] = {"keys": folder / "keys", "base_model_name": "tiny"}
    environment, credentials = {}, None
    if authority is not None:
        cert, key = authority.issue("server", "localhost", "127.0.0.1")
        flags |= {"tls_cert": cert, "tls_key": key, "client_ca": authority.file}
        own = authority.issue("client")
        files = zip(("CA", "CERT", "KEY"), (authority.file, *own), strict=True)
        environment = {f"MINT_TLS_{name}": str(file) for name, file in files}
        pair = [file.read_bytes() for file in reversed(own)]
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *pair)

    def channel(service: RunningService) -> grpc.Channel:
        limits = [("grpc.max_send_message_length", -1)]
        if credentials is None:
            return grpc.insecure_channel(service.address, limits)
        return grpc.secure_channel(service.address.removeprefix("https://"), credentials, limits)

    with (
        patch.dict(os.environ, environment),
        running_sampler(model, folder / "store", **flags) as sampler,
        running_trainer(
            model, folder / "store", **flags, sampler_address=sampler.address
        ) as trainer,
        channel(trainer) as to_trainer,
        channel(sampler) as to_sampler,
        mint.ServiceClient(base_url=trainer.address, api_key=keys["good"]) as good,
        mint.ServiceClient(base_url=trainer.address, api_key=keys["other"]) as other,
    ):
        hostile = Hostile(to_trainer, to_sampler, keys["bad"], size, root)
        workers = (Neighbour(each, each.create_sampling_client()) for each in (good, other))
        yield Stage((trainer, sampler), hostile, *workers)
