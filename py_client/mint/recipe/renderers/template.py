"""The tokenizer's own chat template."""

import re
from collections.abc import Collection, Sequence
from itertools import count, groupby

from mint.errors import refused
from mint.recipe.renderers.chat_format import ChatFormat, Rendered
from mint.recipe.renderers.messages import Message
from mint.recipe.renderers.tokenizer import Tokenizer, encode_with_starts, template_text

Span = tuple[int, int]  # start and end, in characters

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_PROBE: list[Message] = [
    {"role": "user", "content": "ping"},
    {"role": "assistant", "content": "PONG"},
]


class Template(ChatFormat):
    """Finds each message in the template's text.

    Where the template marks what the model generates, its marks decide for assistant messages. Else
    a message lies where another content changes the text, and an assistant's begins where the
    generation prompt for it ends.
    """

    roles = ("system", "user", "assistant", "tool")
    template_options = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise refused("tokenizer", "has no chat template; use renderer `role_colon`")
        self._tokenizer = tokenizer
        self._marked = _GENERATION_MARK.search(str(tokenizer.chat_template)) is not None
        self._end, self.stops = self._find_end()

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        text = template_text(self._tokenizer, messages)
        marked = self._marked_spans(messages, text) if self._marked else {}
        return Rendered(text, {i: marked.get(i) or self._span(messages, i, text) for i in wanted})

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        if role != "assistant":
            raise refused("role", f"is {role!r}; a chat template prompts for the assistant alone")
        return template_text(self._tokenizer, messages, add_generation_prompt=True)

    def _find_end(self) -> tuple[str, list[int] | list[str]]:
        """What ends an assistant's message: its text, and what to stop at."""
        tail = template_text(self._tokenizer, _PROBE).rpartition("PONG")[2]
        tokens, starts = encode_with_starts(self._tokenizer, tail)
        if tokens and tokens[0] in self._tokenizer.added_tokens_decoder:
            return tail[: [*starts, len(tail)][1]], [tokens[0]]
        if tail.strip():
            return tail, [tail]
        eos = self._tokenizer.eos_token_id
        return "", [] if eos is None else [eos]

    def _marked_spans(self, messages: Sequence[Message], text: str) -> dict[int, Span]:
        """Runs of generated tokens, one per assistant message; none if they do not match up."""
        encoded = self._tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, starts = encode_with_starts(self._tokenizer, text)
        bounds = [*starts, len(text)]
        runs = groupby(range(len(tokens)), key=encoded["assistant_masks"].__getitem__)
        places = [list(run) for generated, run in runs if generated]
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(places) != len(assistants):
            return {}
        spans = ((bounds[place[0]], bounds[place[-1] + 1]) for place in places)
        return dict(zip(assistants, spans, strict=True))

    def _span(self, messages: Sequence[Message], index: int, text: str) -> Span:
        """Where a message's output lies, found by giving it another content."""
        marker = next(m for m in (f"MARKER{n}X" for n in count()) if m not in text)
        changed: list[Message] = [{"role": m["role"], "content": m["content"]} for m in messages]
        changed[index]["content"] = marker
        before, found, after = template_text(self._tokenizer, changed).partition(marker)
        start = len(before) if text.startswith(before) else None
        end = len(text) - len(after)
        if messages[index]["role"] == "assistant" and index > 0:
            prompt = self.prompt(messages[:index], "assistant")
            if text.startswith(prompt) and len(prompt) <= end:
                start = len(prompt)
        if not found or start is None or not text.endswith(after) or end < start:
            raise refused(
                f"messages[{index}]",
                "cannot be found in what the chat template makes of it; use another renderer",
            )
        return start, end + len(self._end) if after.startswith(self._end) else end
