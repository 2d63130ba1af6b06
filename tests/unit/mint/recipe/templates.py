"""Chat templates of the models that have renderers of their own.

Those below are written for these tests from the models' documentation: Llama 3's from the prompt
format in its model card, Qwen3's from its model card's account of `enable_thinking` and of thinking
left out of history, gpt-oss's from that of its response format. The models' original templates come
from the package `trl`, where its files are installed; only files are read, nothing of it is
imported.
"""

from importlib.util import find_spec
from pathlib import Path

LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

QWEN3 = (
    "{% set at = namespace(question=messages | length - 1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set at.question = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}"
    "{% set pieces = m.content.split('</think>') %}"
    "{% set answer = pieces[-1].lstrip('\n') if pieces | length > 1 else m.content %}"
    "{% set thought = pieces[0].split('<think>')[-1].strip('\n') if pieces | length > 1 else '' %}"
    "{% if loop.index0 > at.question and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + answer.lstrip('\n') }}"
    "{% else %}{{ answer }}{% endif %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)

# An answer ends where the next role's mark stands.
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# The last answer ends in another mark than those before it.
GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}{{ '<|message|>' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# No mark ends anything.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# ChatML whose template says what the model generates.
MARKED = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def packaged(name: str) -> str | None:
    """A model's original template, if the package that carries it is installed."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return file.read_text() if file.exists() else None
