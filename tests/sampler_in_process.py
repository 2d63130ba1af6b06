"""The sampler's engine in the test's own process."""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from checkpoint_store import Manifest, parse_path, write_published_row
from mint_core.engine_host.pipe import Failure, Part, Reply
from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow
from mint_core.lora.spec import AdapterArrays, AdapterSpec, LoraRequest
from mint_core.lora.targets import initial_arrays, resolve
from sampler_service.config import SamplerConfig
from sampler_service.engine.engine import Answer, Engine
from sampler_service.jobs import (
    BASE_MODEL,
    Abort,
    Choice,
    Constraint,
    Generate,
    Generated,
    LoadAdapter,
    SamplePart,
    Sampling,
    Stops,
    Tokens,
)
from tests.engines_in_process import random_arrays

ENDLESS = Stops()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(SamplerConfig):
    """Allows caches that are smaller than a server's."""

    def __post_init__(self) -> None:
        pass


class SamplerEngine:
    """An engine with its calls numbered, and every pass made when it is asked for."""

    def __init__(self, folder: Path, **changes: object) -> None:
        settings = {
            "base_model": str(folder),
            "base_model_name": "tiny",
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "max_lora_rank": 128,
            "max_running_samples": 16,
            "kv_cache_tokens": 16_384,
        }
        config = Config(**{**settings, **changes})  # type: ignore[arg-type]
        self.engine = Engine(config, lambda: None)
        self.model = self.engine.description
        self.arrays: dict[str, AdapterArrays] = {}  # of the loaded adapters
        self._numbers = itertools.count(1)
        self._answers: dict[int, Generated | MintError | None] = {}
        self.parts: dict[int, list[SamplePart]] = {}  # by number of the call

    def load(self, path: str, request: LoraRequest, *, random: int) -> None:
        """Loads an adapter with random weights, neither A nor B zero."""
        spec = resolve(request, self.model.linear_modules)
        arrays = random_arrays(initial_arrays(spec, self.engine.base.shapes), random)
        self.load_arrays(path, spec, arrays)

    def load_arrays(self, path: str, spec: AdapterSpec, arrays: AdapterArrays) -> None:
        """Loads an adapter as it is."""
        with tempfile.TemporaryDirectory() as folder:  # a row stays when its file is gone
            file = Path(folder, "row")
            layout = self.engine.adapters.layout(spec.rank)
            row, manifest = layout.row(spec, arrays), manifest_of(path, spec)
            write_published_row(file, row, layout, manifest)
            self.engine.accept(0, LoadAdapter(path, str(file)))
        self.arrays[path] = arrays

    def row(self, path: str) -> AdapterRow:
        return self.engine.adapters.rows[path]

    def submit(
        self,
        prompt: Sequence[int],
        *,
        adapter: str = BASE_MODEL,
        num_samples: int = 1,
        max_tokens: int = 8,
        stops: Stops = ENDLESS,
        constraint: Constraint | None = None,
        prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_tokens: Tokens | None = None,
        prompt_alternatives: int = 0,
        scored_tokens: int | None = None,
        routed_experts: bool = False,
        tenant: str = "",
        stream: bool = False,
        start_within_s: float | None = None,
        **choice: object,
    ) -> int:
        """Sends a request and returns its number."""
        number = next(self._numbers)
        sampling = Sampling(
            prompt=np.array(prompt, np.int64),
            num_samples=num_samples,
            max_tokens=max_tokens,
            choice=Choice(**{"seed": 0, **choice}),  # type: ignore[arg-type]
            stops=stops,
            constraint=constraint,
            prompt_logprobs=prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_tokens=target_prompt_tokens,
            prompt_alternatives=prompt_alternatives,
            scored_tokens=scored_tokens,
            routed_experts=routed_experts,
        )
        job = Generate(
            request_id=number,
            adapter=adapter,
            sampling=sampling,
            tenant=tenant,
            stream=stream,
            start_within_s=start_within_s,
        )
        answer = self.engine.accept(number, job)
        if answer is not None:
            self._take(answer)
        return number

    def abort(self, number: int) -> None:
        self.engine.accept(0, Abort(number))

    def step(self) -> None:
        for answer in self.engine.step():
            self._take(answer)

    def _take(self, answer: Answer) -> None:
        match answer:
            case Part(number, part):
                assert number not in self._answers, "parts come before the answer"
                self.parts.setdefault(number, []).append(part)
            case Reply(number, value) | Failure(number, value):
                self._answers[number] = value

    @property
    def answered(self) -> set[int]:
        """Those whose answers nobody has taken yet."""
        return set(self._answers)

    def drain(self) -> None:
        while self.engine.busy:
            self.step()

    def answer(self, number: int) -> Generated:
        """Makes passes until the request is answered, and returns or raises the answer."""
        while number not in self._answers:
            self.step()
        answer = self._answers.pop(number)
        if isinstance(answer, MintError):
            raise answer
        assert answer is not None
        return answer

    def generate(self, prompt: Sequence[int], **wishes: object) -> Generated:
        return self.answer(self.submit(prompt, **wishes))  # type: ignore[arg-type]


def manifest_of(revision_path: str, spec: AdapterSpec) -> Manifest:
    path = parse_path(revision_path)
    assert path.revision is not None
    return Manifest(
        tenant="default",
        training_run_id=path.training_run_id,
        kind=path.kind,
        name=path.name,
        revision=path.revision,
        base_model="tiny",
        base_fingerprint="f",
        spec=spec,
        step=1,
        create_time=datetime.now(UTC),
    )
