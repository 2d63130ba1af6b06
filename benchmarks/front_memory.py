"""What does the trainer's front hold of a row of 1 GiB? Its memory while the row is saved, loaded,
created from, exported, downloaded and uploaded.

The model is one wide layer with random weights, the adapter's rank as large as that. Memory is what
the front's process has to itself (USS), 50 times a second.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from transformers import Qwen3Config, Qwen3ForCausalLM

import mint
from tests.models import tiny_qwen3
from tests.servers import running_trainer

WIDTH, RANK = 4096, 4096
MIB = 2**20
TARGET_MIB = 64
Row = dict[str, object]


def make_model(folder: Path) -> Path:
    """The tests' tiny model with its tokenizer, with one layer that is wide."""
    config = Qwen3Config.from_pretrained(tiny_qwen3(folder))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, WIDTH, WIDTH
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 32, 32, WIDTH // 32
    config.layer_types = config.layer_types[:1]
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


class Memory:
    """Looks at a process again and again."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def during(self, name: str, act: Callable[[], object]) -> Row:
        """How much more the process had at most while something was done."""
        before = self._most = self._bytes()
        started_s = time.perf_counter()
        act()
        seconds = time.perf_counter() - started_s
        more = round((self._most - before) / MIB)
        return {"name": name, "ours": more, "seconds": round(seconds, 1), "target": TARGET_MIB}

    def _watch(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while True:
                self._most = max(self._most, self._bytes())
                time.sleep(0.02)

    def _bytes(self) -> int:
        return int(self._process.memory_full_info().uss)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        with (
            running_trainer(model, folder / "store", max_lora_rank=RANK) as trainer,
            mint.ServiceClient(base_url=trainer.address) as service,
        ):
            memory = Memory(trainer.process.pid)
            for row in rows(service, memory, folder):
                print(json.dumps(row), flush=True)


def rows(service: mint.ServiceClient, memory: Memory, folder: Path) -> Iterator[Row]:
    run = service.create_lora_training_client(rank=RANK, seed=0)
    rest = service.create_rest_client()
    state = f"mint://{run.training_run_id}/weights/s"
    adapter = f"mint://{run.training_run_id}/sampler_weights/a"
    deeds: dict[str, Callable[[], object]] = {
        "training state, 3 GiB, saved": lambda: run.save_state("s").result(),
        "an adapter of 1 GiB, saved for samplers": lambda: run.save_weights_for_sampler(
            "a"
        ).result(),
        "training state loaded": lambda: run.load_state_with_optimizer(state).result(),
        "a run created from it": lambda: service.create_training_client_from_state_with_optimizer(
            state
        ),
        "an adapter merged": lambda: rest.export_checkpoint(adapter).result(),
        "downloaded": lambda: rest.download_checkpoint(adapter, folder / "files").result(),
        "uploaded": lambda: rest.upload_checkpoint(folder / "files", "u").result(),
    }
    for name, deed in deeds.items():
        yield memory.during(name, deed)


if __name__ == "__main__":
    main()
