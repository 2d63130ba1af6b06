"""Records what an outside package makes of conversations: `renderings.json`, which tests read.

    python -m tests.unit.mint.recipe.record_renderings NAME FILE [OPTION=true|false ...]

prints one entry, for renderer NAME, to which the source is added by hand. FILE is out of the
package: a chat template (.jinja), or the module of DeepSeek's encoder, whose one option is
`thinking`.
"""

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.unit.mint.recipe.test_against_templates import CONVERSATIONS

Render = Callable[[list[dict[str, str]], bool], str]


class _Refused(Exception):
    pass


def _raise(message: str) -> None:
    raise TemplateError(message)


def _template(path: Path, options: dict[str, bool]) -> Render:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(path.read_text())

    def render(messages: list[dict[str, str]], prompts: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=prompts, **options)

    return render


def _encoder(path: Path, options: dict[str, bool]) -> Render:
    """It takes thinking beside the content, and its text is a prompt if a question is the last."""
    spec = spec_from_file_location("encoder", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    mode = "thinking" if options.get("thinking") else "chat"

    def render(messages: list[dict[str, str]], prompts: bool) -> str:
        if prompts != (messages[-1]["role"] == "user"):
            raise _Refused
        told = []
        for message in messages:
            thinking, closed, rest = message["content"].partition("</think>")
            beside = {"content": rest, "reasoning_content": thinking.removeprefix("<think>")}
            told.append({**message, **beside} if closed else message)
        try:
            return str(module.encode_messages(told, mode))
        except module.DS32EncodingError as error:
            raise _Refused from error

    return render


def _record(render: Render) -> list[dict[str, Any]]:
    entries = []
    for messages in CONVERSATIONS.values():
        for key, prompts in (("whole", False), ("prompt", True)):
            try:
                text = render([dict(message) for message in messages], prompts)  # type: ignore[call-overload]
            except (_Refused, TemplateError):
                continue
            entries.append({"messages": messages, key: text})
    return entries


if __name__ == "__main__":
    name, file, *pairs = sys.argv[1:]
    options = {key: value == "true" for key, _, value in (pair.partition("=") for pair in pairs)}
    make = _template if file.endswith(".jinja") else _encoder
    lines = ",\n".join(json.dumps(entry) for entry in _record(make(Path(file), options)))
    print(f'{{"renderer": "{name}", "renderings": [\n{lines}\n]}}')  # noqa: T201
