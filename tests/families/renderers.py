"""Which renderer writes a family's conversations, and what it is compared with token for token.
tests/unit/mint/recipe/test_against_templates.py compares.
"""

from typing import NamedTuple

_TRL = "trl 1.16.0"


class Compared(NamedTuple):
    """A row of the page."""

    families: str
    renderers: tuple[str, ...]
    reference: str  # a template's file; none: why
    source: str  # the package that carries it


COMPARED = (
    Compared(
        "any with a chat template",
        ("template",),
        "the templates of SmolLM2, GLM and gpt-oss",
        f"the embedded model; {_TRL}",
    ),
    Compared("base models", ("role_colon",), "none: no model's template writes it", ""),
    Compared("Llama 3", ("llama3",), "`llama3.jinja`", _TRL),
    Compared("Qwen 3", ("qwen3", "qwen3_disable_thinking"), "`qwen3.jinja`", _TRL),
    Compared(
        "Qwen 3.5, 3.6",
        ("qwen3_5", "qwen3_5_disable_thinking", "qwen3_5_preserve_thinking"),
        "`qwen3_5_think.jinja`, `qwen3_5_nothink.jinja`, `qwen3_6.jinja` (all of "
        "`preserve_thinking`)",
        f"{_TRL}; llama-cpp-python 0.3.36 carries the first, vllm 0.33.0 the second",
    ),
    Compared(
        "Qwen 3.8",
        (
            *(f"qwen3_8_{effort}_reasoning" for effort in ("xhigh", "medium", "low")),
            "qwen3_8_disable_thinking",
        ),
        "`qwen3_8.jinja`, which takes thinking beside the content: so does `template`, which has "
        "no place for it",
        _TRL,
    ),
    Compared("Gemma 1 to 3", ("gemma3",), "`gemma3.jinja`, `gemma.jinja`", _TRL),
    Compared(
        "Gemma 4",
        ("gemma4", "gemma4_disable_thinking"),
        "`gemma4_v5.jinja`, the revision of July 2026",
        _TRL,
    ),
    Compared(
        "GLM-4.5, GLM-4.6",
        ("glm4_5", "glm4_5_disable_thinking"),
        "`glm4moe.jinja`; llama-cpp-python's `GLM-4.6.jinja` differs in tools alone",
        _TRL,
    ),
    Compared(
        "GLM-4.7",
        ("glm4_7", "glm4_7_disable_thinking"),
        "`GLM-4.7-Flash.jinja`, recorded",
        "llama-cpp-python 0.3.36 (sdist), `vendor/llama.cpp/models/templates`",
    ),
    Compared(
        "DeepSeek-R1",
        ("deepseek_r1",),
        "`deepseekv3.jinja` (R1's, by that name), `deepseek_r1_distill.jinja`; for the last "
        "answer's thinking `deepseek_r1_distill_training.jinja`",
        _TRL,
    ),
    Compared(
        "DeepSeek-V3.2",
        ("deepseekv3", "deepseekv3_thinking"),
        "DeepSeek's own encoder, `encoding_dsv32.py`, recorded",
        "sglang 0.5.10.post1 (sdist), `sglang/srt/entrypoints/openai`",
    ),
)


def table() -> str:
    """As the page has it."""
    rows = []
    for row in COMPARED:
        names = ", ".join(f"`{name}`" for name in row.renderers)
        rows.append(f"| {row.families} | {names} | {row.reference} | {row.source} |")
    return "\n".join(rows)
