"""The example clients train and sample to the same bits as the reference, whatever happens on the
way.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.authorities import Authority
from tests.keys import make_key
from tests.languages.proxy import SwallowingProxy
from tests.languages.table import LANGUAGES, ROOT, Language, required
from tests.models import own_model, tiny_qwen3
from tests.servers import running_sampler, running_trainer
from tests.services import running_services
from tests.supervised import Supervised, supervised

NAME = "tiny"
BUILD_LIMIT_S = 400.0
RUN_LIMIT_S = 180.0
EMBEDDED = ROOT / ".models" / "SmolLM2-135M-Instruct"  # as `make serve` has it
FALL = 0.1

Outcome = dict[str, Any]

pytestmark = [
    pytest.mark.languages,
    pytest.mark.timeout(BUILD_LIMIT_S + RUN_LIMIT_S),
    pytest.mark.parametrize(
        "client",
        [pytest.param(name, marks=getattr(pytest.mark, name)) for name in LANGUAGES],
        indirect=True,
    ),
]


class Pair:
    """A trainer that is started again whenever it ends, and a sampler."""

    def __init__(self, trainer: Supervised, sampler: str) -> None:
        self.trainer = trainer
        self.sampler = sampler

    def environment(self, trainer: str | None = None, sampler: str | None = None) -> dict[str, str]:
        return {
            "MINT_BASE_URL": trainer or self.trainer.address,
            "MINT_SAMPLER_URL": sampler or self.sampler,
        }


def ended(client: Language, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A client that has run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MINT_")}
    return subprocess.run(
        client.run,
        cwd=client.folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
    )


def run(client: Language, environment: dict[str, str]) -> Outcome:
    """The line that a client prints."""
    done = ended(client, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1]
    outcome: Outcome = json.loads(line)
    told = [f"step {number}: loss " for number, _ in enumerate(outcome["losses"], 1)]
    assert [step for step in told if step in done.stderr] == told
    return outcome


def learned(losses: list[float]) -> bool:
    """Whether each is less than the one before, and the last one little of the first."""
    falls = all(after < before for before, after in pairwise(losses))
    return falls and losses[-1] <= FALL * losses[0] < losses[-2]


def calls(outcome: Outcome) -> int:
    """Of a trainer by an undisturbed client, at least."""
    return 8 + 2 * len(outcome["losses"])


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Language:
    """A language's client, built."""
    name = request.param
    language = LANGUAGES[name]
    if name not in required() and not language.is_at_hand():
        pytest.skip(f"`make languages LANGUAGES={name}` says what {name} needs")
    if language.build:
        built = subprocess.run(
            language.build,
            cwd=language.folder,
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
        )
        assert built.returncode == 0, built.stdout + built.stderr
    return language


@pytest.fixture(scope="module")
def pair(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    store = folder / "store"
    with (
        running_sampler(qwen3_folder, store, base_model_name=NAME) as sampler,
        supervised(
            "trainer_service",
            folder,
            base_model=qwen3_folder,
            base_model_name=NAME,
            device="cpu",
            store=store,
            sampler_address=sampler.address,
        ) as trainer,
    ):
        yield Pair(trainer, sampler.address)


@pytest.fixture(scope="module")
def guarded(
    qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A client's environment for a pair that asks for a key and a certificate."""
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder / "certificates")
    cert, key = authority.issue("server", "localhost", "127.0.0.1")
    flags: dict[str, Any] = {
        "base_model_name": NAME,
        "tls_cert": cert,
        "tls_key": key,
        "client_ca": authority.file,
        "keys": folder / "keys.txt",
    }
    own_key = make_key("ada", folder / "keys.txt")
    own_cert = authority.issue("ada")
    store = folder / "store"
    with (
        running_sampler(qwen3_folder, store, **flags) as sampler,
        running_trainer(qwen3_folder, store, sampler_address=sampler.address, **flags) as trainer,
    ):
        yield {
            "MINT_BASE_URL": trainer.address,  # https://HOST:PORT
            "MINT_SAMPLER_URL": sampler.address,
            "MINT_API_KEY": own_key,
            "MINT_TLS_CA": str(authority.file),
            "MINT_TLS_CERT": str(own_cert[0]),
            "MINT_TLS_KEY": str(own_cert[1]),
        }


@pytest.fixture(scope="module")
def expected(pair: Pair) -> Outcome:
    outcome = run(LANGUAGES["python"], pair.environment())
    assert learned(outcome["losses"])
    assert outcome["refused"] == {
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_REQUEST",
        "field": "data[0].loss_fn_inputs.target_tokens",
    }
    assert len(outcome["tokens"]) == 8
    assert outcome["streamed"] == outcome["tokens"]
    return outcome


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], Outcome]]:
    """A client's environment for a pair on the embedded model, and what the reference prints."""
    if not (EMBEDDED / "SOURCE.md").exists():
        pytest.skip("`make model` has not made the embedded model")
    with running_services(EMBEDDED, tmp_path_factory.mktemp("embedded"), name=NAME) as both:
        environment = {"MINT_BASE_URL": both.trainer, "MINT_SAMPLER_URL": both.sampler}
        outcome = run(LANGUAGES["python"], environment)
        assert learned(outcome["losses"])
        assert outcome["text"].split()[0] == "5"
        yield environment, outcome


@pytest.fixture(scope="module")
def numb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A client's environment for a trainer whose model learns nothing: nothing reaches its head."""
    folder = tiny_qwen3(tmp_path_factory.mktemp("numb"))
    model = own_model(folder)
    model.model.norm.weight.data.zero_()
    model.save_pretrained(folder)
    with running_trainer(folder, folder / "store", base_model_name=NAME) as trainer:
        yield {"MINT_BASE_URL": trainer.address, "MINT_SAMPLER_URL": trainer.address}


@pytest.fixture
def proxied() -> Iterator[Callable[[str, Callable[[int], bool]], SwallowingProxy]]:
    """Makes proxies."""
    with ExitStack() as closing:

        def make(target: str, swallows: Callable[[int], bool]) -> SwallowingProxy:
            proxy = SwallowingProxy(target, swallows)
            closing.callback(proxy.close)
            return proxy

        yield make


def test_all_went_well(client: Language, pair: Pair, expected: Outcome) -> None:
    assert run(client, pair.environment()) == expected


def test_every_second_answer_was_lost(
    client: Language, pair: Pair, expected: Outcome, proxied: Any
) -> None:
    trainer, sampler = (
        proxied(address, lambda call: call % 2 == 0)
        for address in (pair.trainer.address, pair.sampler)
    )
    assert run(client, pair.environment(trainer.address, sampler.address)) == expected
    assert trainer.calls >= 2 * calls(expected) - 1
    assert sampler.calls >= 3


def test_the_trainer_was_killed_and_started_again(
    client: Language, pair: Pair, expected: Outcome, proxied: Any
) -> None:
    def dies(call: int) -> bool:
        if call == calls(expected) // 2:
            pair.trainer.kill()
        return call == calls(expected) // 2

    starts = pair.trainer.starts
    proxy = proxied(pair.trainer.address, dies)
    assert run(client, pair.environment(proxy.address)) == expected
    assert pair.trainer.starts == starts + 1
    assert proxy.calls > calls(expected)


def test_a_key_and_a_certificate_were_asked_for(
    client: Language, guarded: dict[str, str], expected: Outcome
) -> None:
    assert run(client, guarded) == expected


def test_the_model_that_make_serve_serves_learns_too(
    client: Language, embedded: tuple[dict[str, str], Outcome]
) -> None:
    environment, expected = embedded
    assert run(client, environment) == expected


def test_a_loss_that_does_not_fall_is_no_success(client: Language, numb: dict[str, str]) -> None:
    done = ended(client, numb)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the loss has not fallen to a tenth of the first" in done.stderr
