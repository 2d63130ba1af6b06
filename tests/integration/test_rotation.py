"""Certificates, authorities and keys take each other's place while tenants train and sample."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import mint
from mint_core.access.key_file import digest_of, remove_key
from tests.authorities import Authority
from tests.keys import make_key
from tests.servers import running_sampler, running_trainer

TENANTS = ("ann", "bob", "cid", "dan")
SERVER = ("server", "localhost", "127.0.0.1")
LIMIT_S = 60.0


class Site:
    """What tenants are given to come in with; it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys, self.clients, self.servers = (folder / n for n in ("keys", "clients", "servers"))
        self.server_ca = Authority(folder / "server")
        self.servers.write_bytes(self.server_ca.file.read_bytes())
        self.server = self.server_ca.issue(*SERVER)
        self.version = 0
        self.key: dict[str, str] = {}
        self.client_ca = Authority(folder / "clients-0")
        self.clients.write_bytes(self.client_ca.file.read_bytes())
        self._hand_out()
        self._environment = threading.Lock()

    def _hand_out(self) -> None:
        self.key = {tenant: make_key(tenant, self.keys) for tenant in TENANTS}
        self.pair = {tenant: self.client_ca.issue(tenant) for tenant in TENANTS}
        self.version += 1

    def add(self) -> tuple[Authority, list[str]]:
        """Everything anew beside what there was, which is returned."""
        old, keys = self.client_ca, list(self.key.values())
        self.server_ca.issue(*SERVER)
        self.client_ca = Authority(self.folder / f"clients-{self.version}")
        self.clients.write_bytes(old.file.read_bytes() + self.client_ca.file.read_bytes())
        self._hand_out()
        return old, keys

    def revoke(self, keys: list[str]) -> None:
        self.clients.write_bytes(self.client_ca.file.read_bytes())
        for key in keys:
            remove_key(self.keys, digest_of(key)[:12])

    @contextmanager
    def client(self, tenant: str, url: str) -> Iterator[mint.ServiceClient]:
        cert, key = self.pair[tenant]
        files = {"CA": self.servers, "CERT": cert, "KEY": key}
        with self._environment:
            os.environ.update({f"MINT_TLS_{name}": str(file) for name, file in files.items()})
            service = mint.ServiceClient(base_url=url, api_key=self.key[tenant], timeout=20)
        with service:
            yield service


def work(site: Site, tenant: str, url: str, stop: threading.Event) -> list[int]:
    """Steps taken with each credential. Raises what any call raises."""
    run_id, taken = "", []
    datum = mint.types.Datum(
        model_input=mint.types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )
    params = mint.types.SamplingParams(max_tokens=2)
    while not stop.is_set():
        version, steps = site.version, 0
        with site.client(tenant, url) as service:
            if run_id:
                run = service.open_training_run(run_id)
            else:
                run = service.create_lora_training_client(rank=1)
                run_id = run.training_run_id
            while version == site.version and not stop.is_set():
                run.forward_backward([datum], "cross_entropy")
                run.optim_step(mint.types.AdamParams()).result(LIMIT_S)
                sampler = run.save_weights_and_get_sampling_client()
                sampler.sample(mint.types.ModelInput.from_ints([1]), 1, params).result(LIMIT_S)
                steps += 1
        taken.append(steps)
    return taken


def test_what_is_replaced_under_load_fails_no_call_and_what_is_revoked_ends(
    qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MINT_TLS_CA", "MINT_TLS_CERT", "MINT_TLS_KEY", "MINT_SAMPLER_URL"):
        monkeypatch.setenv(name, "")  # put back afterwards
    site, store = Site(tmp_path / "site"), tmp_path / "store"
    flags = {
        "tls_cert": site.server[0],
        "tls_key": site.server[1],
        "client_ca": site.clients,
        "keys": site.keys,
        "tenant_by": "both",
    }
    stop = threading.Event()
    with (
        running_sampler(qwen3_folder, store, **flags) as sampler,
        running_trainer(qwen3_folder, store, sampler_address=sampler.address, **flags) as trainer,
        ThreadPoolExecutor(len(TENANTS)) as threads,
    ):
        working = [threads.submit(work, site, tenant, trainer.address, stop) for tenant in TENANTS]
        try:
            for _ in range(2):
                time.sleep(1)
                with site.client("ann", trainer.address) as before:
                    watch = before.watch_training_run(
                        before.create_lora_training_client(rank=1).training_run_id
                    )
                    next(iter(watch))
                    _, keys = site.add()
                    time.sleep(1)  # all go over to what is new
                    site.revoke(keys)
                    with pytest.raises(mint.AuthenticationError):
                        deque(watch, maxlen=0)
                    with pytest.raises(mint.APIError):
                        before.get_server_capabilities()
                assert not any(each.done() for each in working)
            time.sleep(1)
        finally:
            stop.set()
        for each in working:
            assert min(each.result(LIMIT_S)[-1:]) > 0
        logs = [service.log_text() for service in (trainer, sampler)]
    assert all(text.count("certificates read again") >= 4 for text in logs)
