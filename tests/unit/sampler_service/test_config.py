"""What the sampler refuses to be told."""

import pytest

from sampler_service.config import SamplerConfig


def test_the_defaults_are_legal() -> None:
    config = SamplerConfig(base_model="m")
    assert config.address == "127.0.0.1:50052"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"max_adapters": 0}, "`max_adapters` must be at least 1, got 0"),
        ({"max_running_samples": 0}, "`max_running_samples` must be at least 1"),
        ({"max_batch_tokens": 520}, "`max_batch_tokens` must be at least 576, or 0"),
        ({"kv_cache_tokens": -1}, "`kv_cache_tokens` must be at least 512, or 0"),
        ({"queue_samples": 0}, "`queue_samples` must be at least 1"),
        ({"queue_tokens": 0}, "`queue_tokens` must be at least 1"),
        ({"max_wait_s": -1.0}, "`max_wait_s` must be at least 0, got -1.0"),
        ({"max_wait_s": float("inf")}, "`max_wait_s` must be at least 0"),
        ({"address": "0.0.0.0:1"}, "needs `keys`"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplerConfig(base_model="m", **flags)  # type: ignore[arg-type]
