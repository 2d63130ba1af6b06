"""What the trainer's front and the process that merges a model say to each other."""

from dataclasses import dataclass

from mint_core.lora.spec import AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    base_folder: str
    adapter_folder: str  # of a checkpoint
    spec: AdapterSpec
    output_folder: str  # exists and is empty
    dtype: str  # "float32", "bfloat16", "float16"; empty: the base model's own
    threads: int


@dataclass(frozen=True, slots=True)
class Merged:
    """The output folder holds configuration and weights. What keeps a merge from that is answered
    as a MintError.
    """

    head_untied: bool
