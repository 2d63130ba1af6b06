"""Which flag of `mint_core.hosting.serve` goes where, and what is refused at once."""

from pathlib import Path

import pytest

from mint_core.errors import InvalidRequest
from mint_core.hosting.serve_flags import parse_serve_flags

OPEN = ("--keys", "k", "--allow-insecure")


def test_without_flags_both_have_their_defaults() -> None:
    flags = parse_serve_flags([])

    assert flags.trainer == flags.sampler == ()
    assert flags.sampler_address == ""
    assert flags.ready_file is None


def test_plain_flags_go_to_both_and_prefixed_ones_to_one() -> None:
    flags = parse_serve_flags(
        [
            *("--base-model=m", "--store", "s", "--allow-insecure", "--trainer-gap-s", "3"),
            *("--sampler-metrics-address=127.0.0.1:1", "--ready-file", "r"),
        ]
    )

    both = ("--base-model=m", "--store", "s", "--allow-insecure")
    assert flags.trainer == (*both, "--gap-s", "3")
    assert flags.sampler == (*both, "--metrics-address=127.0.0.1:1")
    assert flags.ready_file == Path("r")


def test_the_trainer_tells_where_the_sampler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1:0", "10.0.0.1:50099"):
        flags = parse_serve_flags(["--sampler-address", address, *OPEN])
        assert flags.sampler_address == address

    monkeypatch.setenv("MINT_SAMPLER_ADDRESS", "127.0.0.1:7")
    assert parse_serve_flags([]).sampler_address == "127.0.0.1:7"


def test_clients_find_the_usual_port_by_themselves() -> None:
    assert parse_serve_flags(["--sampler-address", "0.0.0.0:50052", *OPEN]).sampler_address == ""


def test_an_address_for_clients_is_the_users_to_say() -> None:
    with pytest.raises(InvalidRequest, match="add --trainer-sampler-address HOST:PORT"):
        parse_serve_flags(["--sampler-address", "0.0.0.0:50099", *OPEN])

    flags = parse_serve_flags(
        ["--trainer-sampler-address", "gpu:50099", "--sampler-address", "0.0.0.0:50099", *OPEN]
    )
    assert flags.sampler_address == ""
    assert flags.trainer[:2] == ("--sampler-address", "gpu:50099")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--address", "127.0.0.1:1"], "use --trainer-address and --sampler-address"),
        (["--metrics-address=127.0.0.1:1"], "use --trainer-metrics-address"),
        (["model"], r"trainer: Unused Tokens: \['model'\]"),
        (["--base-model", "a", "b"], r"trainer: Unused Tokens: \['b'\]"),
        (["--queue-calls", "3"], "sampler: Unknown option: --queue-calls"),
        (["--trainer-queue-cals", "3"], "trainer: Unknown option: --trainer-queue-cals"),
        (["--trainer-queue-calls", "0"], "trainer: `--trainer-queue-calls` must be at least 1"),
        (["--sampler-address", "localhost"], "sampler: `--sampler-address` must look like"),
        (["--trainer-sampler-address", "x"], "trainer: `--trainer-sampler-address` must look like"),
        (["--trainer-ready-file", "r"], "`ready_file` of the trainer is not for this"),
    ],
)
def test_what_either_service_would_refuse_is_refused_as_it_was_given(
    argv: list[str], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        parse_serve_flags(argv)


def test_variables_of_both_services_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_TRAINER_GAP_S", "x")
    with pytest.raises(InvalidRequest, match="trainer: Invalid value for MINT_TRAINER_GAP_S"):
        parse_serve_flags([])
