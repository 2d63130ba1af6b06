"""How the metrics of a call's tiles are joined."""

from trainer_service.jobs import TileResult
from trainer_service.run.execution import merge_metrics


def test_metrics_merge_as_their_suffixes_say() -> None:
    results = [
        TileResult(metrics={"loss:sum": 2.0, "x:mean": 1.0, "y:min": 3.0, "z:max": 3.0}),
        TileResult(metrics={"loss:sum": 5.0, "x:mean": 4.0, "y:min": 1.0, "z:max": 9.0}),
    ]

    assert merge_metrics(results, [30, 10]) == {
        "loss:sum": 7.0,
        "x:mean": 1.75,  # counted by tokens
        "y:min": 1.0,
        "z:max": 9.0,
    }
