"""Settings from flags, the environment and a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mint_core.errors import InvalidRequest
from mint_core.hosting.service_config import ServiceConfig, option
from mint_core.hosting.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ServiceConfig):
    """Does."""

    budget: float = option(0.5, "how much, in % of `all` [of it]")
    mode: Literal["fast", "slow"] = option("fast", "how")

    def __post_init__(self) -> None:
        ServiceConfig.__post_init__(self)
        if self.budget > 1:
            raise ValueError(f"`budget` must be at most 1, got {self.budget}; `make` more")


def read(*words: str) -> Config:
    return Settings("trainer", Config, words).config


def refusal(*words: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(*words)
    return caught.value.message


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `--config` names."""
    monkeypatch.setenv("MINT_TRAINER_CONFIG", str(tmp_path / "mint.toml"))
    return tmp_path / "mint.toml"


def test_defaults_are_the_fields() -> None:
    assert read() == Config()


def test_flags_are_the_fields_with_their_types() -> None:
    config = read(
        *("--store", "a/b", "--threads", "2", "--budget", "0.25", "--mode", "slow"),
        *("--keys", "k", "--allow-insecure", "--address", "0.0.0.0:1", "--metrics-address", ""),
    )

    assert (config.store, config.metrics_address) == ("a/b", "")
    assert (config.threads, config.budget, config.mode) == (2, 0.25, "slow")
    assert (config.keys, config.allow_insecure) == (Path("k"), True)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("threads = 2\nmax_lora_rank = 2\nstore = 's'\nallow_insecure = true")
    monkeypatch.setenv("MINT_TRAINER_THREADS", "3")
    monkeypatch.setenv("MINT_TRAINER_MAX_LORA_RANK", "3")

    config = read("--threads", "4")
    assert (config.threads, config.max_lora_rank, config.store) == (4, 3, "s")
    assert config.allow_insecure
    assert not read("--allow-insecure=false").allow_insecure


def test_a_file_has_keys_for_both_services_and_for_one(file: Path) -> None:
    file.write_text("threads = 2\nbudget = 1\n[trainer]\nthreads = 3\n[sampler]\nnobody = 4")
    assert (read().threads, read().budget) == (3, 1.0)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--thread", "2"], "Unknown option: --thread. Did you mean --threads?"),
        (["--no-allow-insecure"], "Unknown option: --no-allow-insecure"),
        (["--threads", "two"], 'Invalid value for --threads: unable to convert "two" into int.'),
        (["--threads", "2.5"], "`--threads` is no whole number: 2.5"),
        (["--threads", "1", "--threads", "2"], "--threads specified multiple times"),
        (["--mode", "medium"], 'Invalid value "medium" for --mode. Choose from: "fast", "slow".'),
        (["--threads", "0"], "`--threads` must be at least 1, got 0"),
        (["--max-lora-rank", "0"], "`--max-lora-rank` must be at least 1, got 0"),
        (["--keys", ""], "`--keys` is empty; leave it out"),
        (["--store", ""], "`--store` is empty; give a folder"),
        (["--budget", "2"], "`--budget` must be at most 1, got 2.0; `make` more"),
        (["--address", "0.0.0.0:1"], "so needs `--keys` or `--client-ca`; give --keys FILE"),
        (["--address", "localhost"], "`--address` must look like HOST:PORT, got 'localhost'"),
        (["--metrics-address", ":9"], "`--metrics-address` must look like HOST:PORT, got ':9'"),
        (["--config", "none"], "`--config` none cannot be read: No such file or directory"),
    ],
)
def test_a_bad_flag_is_refused_by_its_name(words: list[str], why: str) -> None:
    assert why in refusal(*words)


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("THREDS", "2", 'Unknown option: "MINT_TRAINER_THREDS" from env.'),
        ("THREADS_", "2", 'Unknown option: "MINT_TRAINER_THREADS_" from env.'),
        ("THREADS", "0", "`MINT_TRAINER_THREADS` must be at least 1, got 0"),
        ("THREADS", "x", "Invalid value for MINT_TRAINER_THREADS from env: unable to convert"),
        ("KEYS", "", "`MINT_TRAINER_KEYS` is empty"),
        ("CONFIG", ".", "`MINT_TRAINER_CONFIG` . cannot be read: Is a directory"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(
    variable: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MINT_TRAINER_{variable}", value)
    assert why in refusal()


def test_a_clients_variable_is_not_a_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_SAMPLER_URL", "127.0.0.1:1")
    monkeypatch.setenv("MINT_SAMPLER_THREADS", "2")
    assert Settings("sampler", Config, ()).config.threads == 2
    assert read().threads == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("thread = 2", "Unknown option: thread from FILE. Did you mean --threads?"),
        ("[trainer]\nthread = 2", "Unknown option: thread from FILE."),
        ("no_allow_insecure = true", "Unknown option: no_allow_insecure from FILE."),
        ("trainer = 2", "Unknown option: trainer from FILE."),
        ("[store]\nx = 2", "from FILE."),
        ("threads = 0", "`threads` in FILE must be at least 1, got 0"),
        ("threads = 2.5", "`threads` in FILE is no whole number: 2.5"),
        ("threads = 'x'", 'Invalid value for threads from FILE: unable to convert "x" into int.'),
        ("threads = true", "Invalid value for threads from FILE"),
        ("store = ['a']", "Invalid value for store from FILE"),
        ("mode = 'x'", 'Invalid value "x" for mode from FILE. Choose from: "fast", "slow".'),
        ("config = 'x'", "`MINT_TRAINER_CONFIG` FILE cannot be read: it names another file"),
        ("threads", "`MINT_TRAINER_CONFIG` FILE cannot be read: Expected '='"),
    ],
)
def test_a_bad_key_is_refused_by_its_name_and_file(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    assert why.replace("FILE", str(file)) in refusal()


def test_help_tells_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")

    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert not caught.value.code
    assert "Does. Every option can be a flag" in shown
    assert "MINT_TRAINER_THREADS=2" in shown
    assert "--budget FLOAT how much, in % of `all` [of it] [default: 0.5]" in shown
    assert "--mode CHOICE how [choices: fast, slow] [default: fast]" in shown
