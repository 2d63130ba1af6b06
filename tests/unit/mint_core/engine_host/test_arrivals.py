"""A file that comes twice at once, for two jobs, is whole whenever it is there."""

import hashlib
from pathlib import Path

import pytest

from mint_core.engine_host.on_ray.files import Arrival

CONTENT = [b"first" * 1000, b"second" * 1000]
DIGEST = hashlib.sha256(b"".join(CONTENT)).digest()


def test_two_arrivals_of_one_file_do_not_touch_each_other(tmp_path: Path) -> None:
    file = tmp_path / "row"
    one = Arrival(file, 0o644)
    one.add(CONTENT[0])
    other = Arrival(file, 0o644)
    one.add(CONTENT[1])
    one.finish(DIGEST)
    assert file.read_bytes() == b"".join(CONTENT)
    other.add(CONTENT[0])
    assert file.read_bytes() == b"".join(CONTENT)
    other.abandon()
    assert [file] == list(tmp_path.iterdir())


def test_what_changed_on_its_way_is_not_shown(tmp_path: Path) -> None:
    arrival = Arrival(tmp_path / "row", 0o644)
    arrival.add(CONTENT[0])
    with pytest.raises(OSError, match="changed on its way"):
        arrival.finish(DIGEST)
    assert not list(tmp_path.iterdir())
