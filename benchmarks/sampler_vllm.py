"""How fast is the sampler beside vLLM on a CPU? The same requests at once, one adapter of rank 16
on attention and MLP, SmolLM2, float32, one thread each, in turn. `make bench-vllm` makes vLLM's
environment; VLLM_PYTHON names its interpreter.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparison import cpu_seconds, faster, report
from benchmarks.sampler_workloads import Ours, adapter_path, agreement, random_requests
from benchmarks.workloads import SMOLLM2
from checkpoint_store.adapter_files import write_files
from mint_core.lora.spec import LoraRequest

ROUNDS = 5
REQUESTS = random_requests(32, (16, 128), (16, 64))
LORA = LoraRequest(rank=16, train_unembed=False)


class Vllm:
    """vLLM in a process of its own."""

    def __init__(self, adapter: Path, requests: Path) -> None:
        side = Path(__file__).with_name("vllm_side.py")
        self._process = subprocess.Popen(
            [os.environ["VLLM_PYTHON"], side, SMOLLM2, adapter, requests],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )

    def round(self) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    ours = Ours(0)
    ours.sampler.load(adapter_path(0), LORA, random=0)
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder, "requests.json")
        requests.write_text(json.dumps([asdict(request) for request in REQUESTS]))
        spec = ours.sampler.row(adapter_path(0)).spec
        write_files(
            Path(folder),
            ours.arrays(0),
            spec=spec,
            base_model=str(SMOLLM2),
            base_fingerprint="",
            step=0,
        )
        vllm = Vllm(Path(folder), requests)
        try:
            warm = vllm.round()  # it compiles on its first call
            share = agreement(ours.generate(REQUESTS, [adapter_path(0)]), warm["tokens"])
            print(f"the same tokens in {share:.0%} of outputs")
            assert share >= 0.7, "not the same model"
            mine, theirs = [], []
            for _ in range(ROUNDS):
                mine.append(cpu_seconds(lambda: ours.generate(REQUESTS, [adapter_path(0)])))
                theirs.append(float(vllm.round()["seconds"]))
        finally:
            vllm.close()
    tokens = sum(request.output_tokens for request in REQUESTS)
    report([faster(f"32 requests at once beside vLLM, {tokens} tokens", mine, theirs, 1.0)])


if __name__ == "__main__":
    main()
