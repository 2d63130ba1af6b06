"""Which flag of `mint_core.hosting.serve` goes where."""

from pathlib import Path

import pytest

from mint_core.errors import InvalidRequest
from mint_core.hosting.serve_flags import parse_serve_flags

EMBEDDED = ("--base-model", ".models/SmolLM2-135M-Instruct")


def test_without_flags_both_serve_the_embedded_model() -> None:
    flags = parse_serve_flags([])

    assert flags.trainer == flags.sampler == EMBEDDED
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


def test_the_trainer_tells_where_the_sampler_is() -> None:
    for address in ("127.0.0.1:0", "10.0.0.1:50099"):
        assert parse_serve_flags(["--sampler-address", address]).sampler_address == address


def test_clients_find_the_usual_port_by_themselves() -> None:
    assert parse_serve_flags(["--sampler-address", "0.0.0.0:50052"]).sampler_address == ""


def test_an_address_for_clients_is_the_users_to_say() -> None:
    with pytest.raises(InvalidRequest, match="add --trainer-sampler-address HOST:PORT"):
        parse_serve_flags(["--sampler-address", "0.0.0.0:50099"])

    flags = parse_serve_flags(
        ["--sampler-address", "0.0.0.0:50099", "--trainer-sampler-address", "gpu:50099"]
    )
    assert flags.sampler_address == ""
    assert flags.trainer[:2] == ("--sampler-address", "gpu:50099")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--address", "127.0.0.1:1"], "use --trainer-address and --sampler-address"),
        (["--metrics-address=127.0.0.1:1"], "use --trainer-metrics-address"),
        (["model"], "'model' is no flag"),
        (["--ready-file"], "`--ready-file` takes one value, got 0"),
        (["--base-model", "a", "b"], "`--base-model` takes one value, got 2"),
    ],
)
def test_what_cannot_be_sorted_is_refused(argv: list[str], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        parse_serve_flags(argv)


def test_an_address_must_be_one() -> None:
    with pytest.raises(ValueError, match="must look like HOST:PORT"):
        parse_serve_flags(["--sampler-address", "localhost"])
