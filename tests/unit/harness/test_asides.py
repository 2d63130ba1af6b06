"""What happens beside the scripts tells of a front that does not answer while the store is held."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.engines.bad_store import BadStore
from tests.harness.asides import Held


def test_a_front_that_waits_for_the_store_is_found_and_the_store_is_let_go(tmp_path: Path) -> None:
    bad = BadStore(tmp_path / "store")
    bad.folder.mkdir()
    nobody = SimpleNamespace(address="127.0.0.1:1")
    stage: Any = SimpleNamespace(bad_store=bad, trainer=nobody, keys=["key"])

    (problem,) = Held(stage, limit_s=0.2).act()

    assert problem.startswith("while the store kept others waiting, a question was told: ")
    assert not (bad.folder / "hold").exists()
