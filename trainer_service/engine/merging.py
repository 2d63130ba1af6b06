"""`python -m trainer_service.engine.merging`: merges an adapter into its base model. A process of
its own, since it loads the model once more, which neither front nor engine should hold.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint_store.adapter_files import read_weights
from checkpoint_store.errors import full_disk_told
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name
from mint_core.lora.targets import HEAD
from mint_core.model.architecture import text_config
from mint_core.model.base_files import check_memory
from mint_core.model.float8.reading import Float8
from mint_core.model.loading import read_model
from trainer_service.checkpoints.apart import Merge, answer_once
from trainer_service.errors import NonFiniteExport

_CPU = torch.device("cpu")
_SHARD_SIZE = "5GB"


@full_disk_told()
@torch.no_grad()
def merge(job: Merge) -> bool:
    """Writes configuration and weights of the merged model. Returns whether its head was tied."""
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.dtype) if job.dtype else None
    check_memory(Path(job.base_folder), _CPU, dtype)
    # What float8 weights stand for is merged with, so that the model is the one that was trained.
    float8 = Float8(kept=False) if job.float8 else None
    model = read_model(Path(job.base_folder), float8, dtype=dtype or "auto")
    untied = HEAD in job.spec.modules and _untie(model)
    _add(model, job.spec, read_weights(Path(job.adapter_folder)))
    _check_finite(model)
    output = Path(job.output_folder)
    model.save_pretrained(output, max_shard_size=_SHARD_SIZE)
    _make_readable(output)
    return untied


def _untie(model: nn.Module) -> bool:
    """Gives the head weights of its own, which are the embedding's so far. Returns whether it had
    none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is not model.get_input_embeddings().weight:  # type: ignore[operator]
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, text_config(model)):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def _add(model: nn.Module, spec: AdapterSpec, weights: AdapterArrays) -> None:
    """W + scale B A, computed in float32 and rounded once."""
    for module in spec.modules:
        weight = model.get_submodule(module).weight  # [out, in]
        a = torch.from_numpy(weights[lora_a_name(module)])  # [rank, in]
        b = torch.from_numpy(weights[lora_b_name(module)])  # [out, rank]
        assert isinstance(weight, nn.Parameter)
        weight.copy_(torch.addmm(weight.float(), b, a, alpha=spec.scale))


def _check_finite(model: nn.Module) -> None:
    broken = {name: each.dtype for name, each in model.named_parameters() if not _finite(each)}
    if broken:
        dtype = str(next(iter(broken.values()))).removeprefix("torch.")
        raise NonFiniteExport(list(broken), dtype)


def _finite(weight: Tensor) -> bool:
    """Without a mask of the weight's size."""
    return all(bool(end.isfinite()) for end in weight.aminmax())  # NaN is either


def _make_readable(folder: Path) -> None:
    """Writers of safetensors make files for their owner alone, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


if __name__ == "__main__":
    answer_once(merge)
