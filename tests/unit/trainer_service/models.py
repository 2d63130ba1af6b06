"""A base model's description."""

from mint_core.engine_host.pipe import ModelDescription

MODEL = ModelDescription(
    name="tiny",
    folder="",
    context_length=16,
    vocabulary_size=100,
    max_lora_rank=64,
    fingerprint="f",
    dtype="float32",
    device="cpu",
    eos_token_ids=(2,),
    bitwise_reproducible=True,
    linear_modules=("lm_head",),
    memory_bytes=0,
)
