"""A store in a fresh folder and small adapters to put in it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name
from tests.checkpoint_files import publish_checkpoint

SPEC = AdapterSpec(
    rank=4, alpha=32.0, use_rslora=False, seed=7, modules=("lm_head", "model.layers.0.q_proj")
)


def adapter(seed: int = 0, spec: AdapterSpec = SPEC) -> dict[str, AdapterArrays]:
    """`weights`, `exp_avg` and `exp_avg_sq` of an adapter, drawn from the seed."""
    generator = np.random.default_rng(seed)
    shapes = dict.fromkeys(map(lora_a_name, spec.modules), (spec.rank, 6))
    shapes |= dict.fromkeys(map(lora_b_name, spec.modules), (8, spec.rank))
    return {
        kind: {
            name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }


Publish = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture
def publish(store: CheckpointStore) -> Publish:
    """Publishes an adapter and returns its revision's path. A test names only what it is about."""

    def publish(name: str | None = "a", **changes: object) -> str:
        arguments = {
            "training_run_id": "r-1",
            "kind": "sampler_weights",
            "tenant": "t",
            "base_model": "tiny",
            "base_fingerprint": "f00d",
            "spec": SPEC,
            "weights": adapter()["weights"],
            "step": 3,
        }
        manifest = publish_checkpoint(store, name=name, **(arguments | changes))  # type: ignore[arg-type]
        return str(manifest.revision_path)

    return publish
