"""What the engine is told to come is wrong, and it dies while it fetches rows: nobody notices."""

from pathlib import Path

from tests.models import VOCABULARY_SIZE
from tests.supervised import dying_at, supervised
from tests.training_load import Answers, train_all

USERS, STEPS = 4, 5


def trained(module: str, model: Path, folder: Path, *points: str) -> list[Answers]:
    """All answers of each user."""
    folder.mkdir()
    flags = {"base_model": model, "device": "cpu", "threads": 1, "snapshot_s": 0.5}
    with supervised(module, folder, [dying_at(point) for point in points], **flags) as service:
        found = train_all(service.address, USERS, STEPS, VOCABULARY_SIZE)
        assert service.starts == 1
    return [answers for answers, _ in found]


def test_an_engine_that_is_misled_and_dies_while_it_fetches_changes_no_bit(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    """Against one in which all rows have room, so that nothing is ever fetched."""
    died = tmp_path / "died"
    expected = trained("trainer_service", qwen3_folder, tmp_path / "resident")
    found = trained(
        "tests.engines.mortal_service",
        qwen3_folder,
        tmp_path / "misled",
        f"rows:fetching@9@{died}",
    )
    assert died.exists()
    assert found == expected
