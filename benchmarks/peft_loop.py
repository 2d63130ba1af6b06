"""The loop that a user would write with PEFT and transformers: right padding to the longest
document, full logits, cross entropy, backward, clipping, AdamW.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mint_core.lora.spec import AdapterSpec
from trainer_service.jobs import AdamParams, Document

IGNORED = -100  # what cross_entropy leaves out


class PeftLoop:
    """One adapter on one model, float32."""

    def __init__(self, folder: Path, spec: AdapterSpec, params: AdamParams) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            target_modules=[name.split(".")[-1] for name in spec.modules],
            lora_dropout=0.0,
        )
        self._model = get_peft_model(base, config)
        self.trained = [p for p in self._model.parameters() if p.requires_grad]
        self._clip_norm = params.grad_clip_norm
        self._optimizer = torch.optim.AdamW(
            self.trained,
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            foreach=True,
        )

    def train(self, documents: Sequence[Document]) -> float:
        """One step of training; returns the loss."""
        loss = self.forward_backward(documents)
        self.step()
        return loss

    def forward_backward(self, documents: Sequence[Document]) -> float:
        tokens, labels, mask = padded(documents)
        logits = self._model(input_ids=tokens, attention_mask=mask).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
        return loss.item()

    def step_on_zero_gradient(self) -> None:
        """Makes gradients and moments, so that a measurement after it does not count them."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.step()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)


def padded(documents: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and attention mask, each [documents, longest]."""
    shape = len(documents), max(len(d.tokens) for d in documents)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, document in enumerate(documents):
        n = len(document.tokens)
        tokens[i, :n] = torch.from_numpy(document.tokens)
        labels[i, :n] = torch.from_numpy(
            document.targets * (document.weights != 0) + IGNORED * (document.weights == 0)
        )
        mask[i, :n] = 1
    return tokens, labels, mask
