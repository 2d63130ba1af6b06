"""Folders on their way, through faults of the transport."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import mint
from tests.unit.mint.checkpoint_server import Checkpoints, serving
from tests.unit.mint.faulty_server import Code, Fault

LIMIT_S = 20.0
PATH = "mint://run-1/weights/a"
FILES = {"adapter_config.json": b"{...}", "adapter_model.safetensors": bytes(range(30)), "e": b""}
AWAY = Fault(Code.UNAVAILABLE)


@pytest.fixture
def checkpoints() -> Checkpoints:
    return Checkpoints(dict(FILES))


@pytest.fixture
def rest(checkpoints: Checkpoints) -> Iterator[mint.RestClient]:
    with serving(checkpoints) as address, mint.RestClient(base_url=address) as client:
        yield client


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "fault", [AWAY, Fault(Code.INTERNAL, message="Received RST_STREAM with error code 2")]
)
def test_a_download_that_is_cut_goes_on_where_it_was(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path, fault: Fault
) -> None:
    checkpoints.cuts = [(9, None), (3, fault), (0, fault), (2, fault)]

    folder = rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)

    assert contents(folder) == FILES
    weights = "adapter_model.safetensors"
    assert checkpoints.asked == [
        ("adapter_config.json", 0),
        (weights, 0),
        (weights, 12),
        (weights, 12),
        (weights, 20),
        ("e", 0),
    ]


def test_a_download_that_failed_is_gone_on_with_by_the_next(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    checkpoints.cuts = [(9, None), (5, Fault(Code.PERMISSION_DENIED))]
    with pytest.raises(mint.PermissionDeniedError):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    assert not (tmp_path / "here").exists()
    checkpoints.asked.clear()

    folder = rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)

    assert contents(folder) == FILES
    assert checkpoints.asked == [
        ("adapter_config.json", 5),
        ("adapter_model.safetensors", 20),
        ("e", 0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_damage_is_found_and_not_kept(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    checkpoints.damaged = True
    with pytest.raises(mint.APIResponseValidationError, match="arrived damaged"):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    assert not (tmp_path / "here").exists()

    folder = rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)

    assert contents(folder) == FILES
    assert [offset for _, offset in checkpoints.asked] == [0, 0, 0, 0]


def test_what_another_program_left_in_between_is_found(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    checkpoints.cuts = [(9, None), (5, Fault(Code.PERMISSION_DENIED))]
    with pytest.raises(mint.PermissionDeniedError):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    (part,) = tmp_path.iterdir()
    (part / "adapter_model.safetensors").write_bytes(b"x" * 20)
    (part / "adapter_config.json").write_bytes(b"longer than it is")

    with pytest.raises(mint.APIResponseValidationError, match="arrived damaged"):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    folder = rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)

    assert contents(folder) == FILES


def test_a_server_that_ends_early_is_not_believed(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    checkpoints.cuts = [(1, None)]
    with pytest.raises(mint.APIResponseValidationError, match="after 4 of 5 bytes"):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)


@pytest.mark.parametrize("name", ["../x", "/x", ".x", "a/b", ""])
def test_a_server_does_not_choose_where_files_go(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path, name: str
) -> None:
    checkpoints.files = {name: b"x"}
    with pytest.raises(mint.APIResponseValidationError, match="names a file"):
        rest.download_checkpoint(PATH, tmp_path / "a" / "here").result(LIMIT_S)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_one_download_at_a_time_writes_to_a_folder(rest: mint.RestClient, tmp_path: Path) -> None:
    started, goes_on = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        started.set()
        assert goes_on.wait(LIMIT_S)

    first = rest.download_checkpoint(PATH, tmp_path / "here", progress=hold)
    assert started.wait(LIMIT_S)
    with pytest.raises(mint.InvalidInputError, match="is under way"):
        rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    goes_on.set()

    assert contents(first.result(LIMIT_S)) == FILES


def test_a_snapshot_that_is_still_being_stored_is_waited_for(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    checkpoints.unstored = 2
    folder = rest.download_checkpoint(PATH, tmp_path / "here").result(LIMIT_S)
    assert contents(folder) == FILES


def test_an_upload_that_is_cut_is_sent_again_under_the_same_id(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    checkpoints.upload_faults = [AWAY, AWAY]
    told: list[tuple[int, int]] = []

    rest.upload_checkpoint(
        tmp_path, "a", progress=lambda done, total: told.append((done, total))
    ).result(LIMIT_S)

    headers = [header for header, _ in checkpoints.uploads]
    assert len(headers) == 3
    assert headers[0] == headers[1] == headers[2]
    assert checkpoints.uploads[-1][1] == {
        name: FILES[name] for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert told[-1] == (35, 35)


def test_whoever_is_told_of_progress_may_wait_for_other_calls(
    checkpoints: Checkpoints, rest: mint.RestClient, tmp_path: Path
) -> None:
    told: list[int] = []

    def wait(done: int, total: int) -> None:
        rest.get_checkpoint(PATH).result(LIMIT_S)
        told.append(done)

    folder = rest.download_checkpoint(PATH, tmp_path / "here", progress=wait).result(LIMIT_S)
    rest.upload_checkpoint(folder, "a", progress=wait).result(LIMIT_S)

    assert told.count(max(told)) >= 2
