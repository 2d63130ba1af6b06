"""The slow, obvious trainer: PEFT + torch.optim.AdamW in float64, document by document."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mint_core.lora.spec import AdapterArrays, AdapterSpec
from tests.models import own_model
from trainer_service.jobs import (
    AdamParams,
    Cispo,
    CrossEntropy,
    Document,
    Dro,
    Gspo,
    ImportanceSampling,
    Loss,
    Ppo,
)


def peft_name(name: str) -> str:
    """The parameter's name inside a live PeftModel."""
    return name.replace(".weight", ".default.weight")


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """In some mixtures of experts PEFT takes the names of projections, those of dense layers and
    shared experts too, for what the experts' were before transformers fused them.
    """
    with pytest.MonkeyPatch.context() as patch:
        name = "convert_peft_config_for_transformers"
        patch.setattr(transformers_weight_conversion, name, lambda *_, **__: None)
        yield


class InFloat64(TorchFunctionMode):
    """Keeps in float64 what models compute in float32 whatever they are in, such as norms."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def longer(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        options = {name: longer(value) for name, value in (kwargs or {}).items()}
        return function(*map(longer, args), **options)


class PeftTrainer:
    """One adapter on one model, by the book."""

    def __init__(self, folder: Path, spec: AdapterSpec, weights: AdapterArrays) -> None:
        base = own_model(folder, torch.float64).double()  # some layers are kept in float32
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            use_rslora=spec.use_rslora,
            target_modules=list(spec.modules),
            lora_dropout=0.0,
        )
        with _names_as_they_are():
            model = get_peft_model(base, config, autocast_adapter_dtype=False)
        assert isinstance(model, PeftModel)
        self.model = model
        self.parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, array in weights.items():
                self.parameters[peft_name(name)].copy_(torch.from_numpy(array))
        self.names = list(weights)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        assert len(trained) == len(self.names)
        self._optimizer = torch.optim.AdamW(trained)

    def logprobs(self, document: Document) -> Tensor:  # as `document.targets`, float64
        with InFloat64():
            logits = self.model(input_ids=torch.from_numpy(document.tokens)[None]).logits[0]
        targets = torch.from_numpy(document.targets)
        wide = targets.reshape(len(targets), -1)
        return logits.log_softmax(-1).gather(1, wide).reshape(targets.shape)

    def loss(self, loss: Loss, documents: Sequence[Document]) -> Tensor:  # []
        return torch.stack([_loss(loss, self.logprobs(d), d) for d in documents]).sum()

    def gradient(self, name: str) -> Tensor:
        gradient = self.parameters[peft_name(name)].grad
        assert gradient is not None
        return gradient

    def step(self, params: AdamParams) -> float:
        """Takes a step, returns the norm of the gradient before clipping."""
        trained = [p for p in self.parameters.values() if p.requires_grad]
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trained, limit).item()
        for group in self._optimizer.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm


def _loss(loss: Loss, logprobs: Tensor, document: Document) -> Tensor:  # []
    """Each formula written out, as in proto/mintrpc/v1/types.proto."""
    weights = torch.from_numpy(document.weights).double()
    if isinstance(loss, CrossEntropy):
        return -(weights * logprobs).sum()
    assert document.logprobs is not None
    assert document.advantages is not None
    old = torch.from_numpy(document.logprobs).double()
    advantages = torch.from_numpy(document.advantages).double()
    ratio = torch.exp(logprobs - old)
    match loss:
        case ImportanceSampling():
            return -(weights * ratio * advantages).sum()
        case Ppo(low, high):
            clipped = torch.clip(ratio, low, high)
            return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
        case Cispo(low, high):
            factor = torch.clip(ratio, low, high).detach()
            return -(weights * factor * logprobs * advantages).sum()
        case Dro(beta):
            return -(weights * (logprobs * advantages - beta / 2 * (logprobs - old) ** 2)).sum()
        case Gspo(low, high):
            assert document.ratio_mask is not None
            inside = torch.from_numpy(document.ratio_mask != 0)
            sequence = torch.exp((logprobs - old)[inside].mean()).detach()
            ratio = sequence * torch.exp(logprobs - logprobs.detach())
            clipped = torch.clip(ratio, low, high)
            return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
