"""The tokenizer's own chat template."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import count, groupby, takewhile
from typing import Any

from mint_chat.chat_format import ChatFormat, Rendered, after_end
from mint_chat.errors import refused
from mint_chat.messages import Message
from mint_chat.tokenizer import Tokenizer, encode_with_starts, template_text

Tool = Mapping[str, Any]  # as JSON describes a function to a model
Span = tuple[int, int]  # start and end, in characters

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_PROBE: list[Message] = [
    {"role": "user", "content": "ping"},
    {"role": "assistant", "content": "PONG"},
] * 2


class Template(ChatFormat):
    """Finds each message in the template's text.

    Where the template marks what the model generates, its marks decide for assistant messages. Else
    a message lies where another content changes the text, and an assistant's begins where the
    generation prompt for it ends. What ends an answer belongs to it, the next role's mark too where
    that does, which then also stands behind the last answer.
    """

    roles = ("system", "user", "assistant", "tool")
    template_options = None

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> None:
        if not tokenizer.chat_template:
            raise refused("tokenizer", "has no chat template; use renderer `role_colon`")
        self._tokenizer = tokenizer
        self._tools = list(tools) or None
        self._marked = _GENERATION_MARK.search(str(tokenizer.chat_template)) is not None
        self._missing = ""  # of the end, behind the last answer
        self.end, self.stops = self._find_end()

    def render(self, messages: Sequence[Message], wanted: Collection[int]) -> Rendered:
        bare = self._text(messages)
        text = bare + (self._missing if messages[-1]["role"] == "assistant" else "")
        marked = self._marked_spans(messages, bare) if self._marked else {}
        spans = {i: marked.get(i) or self._span(messages, i, bare) for i in wanted}
        ended = {i: (start, after_end(text, end, self.end)) for i, (start, end) in spans.items()}
        return Rendered(text, ended)

    def prompt(self, messages: Sequence[Message], role: str) -> str:
        if role != "assistant":
            raise refused("role", f"is {role!r}; a chat template prompts for the assistant alone")
        return self._text(messages, add_generation_prompt=True)

    def _text(self, messages: Sequence[Message], **options: bool) -> str:
        return template_text(self._tokenizer, messages, tools=self._tools, **options)

    def _find_end(self) -> tuple[str, list[int] | list[str]]:
        """What ends an answer in the text, and what to stop at."""
        eos = self._tokenizer.eos_token_id
        nothing: tuple[str, list[int]] = "", [] if eos is None else [eos]
        pieces = self._text(_PROBE).split("PONG")
        if len(pieces) != 3:
            return nothing
        between, after = pieces[1].partition("ping")[0], pieces[2]
        plain, mark, stop = self._first_mark(after)
        if mark and not plain.strip():  # that of the last answer, if earlier ones have another
            return plain + mark, [stop]
        earlier, mark, stop = self._first_mark(between)
        end = earlier + mark
        if mark and not earlier.strip() and end.startswith(after):  # the next role's
            self._missing = end.removeprefix(after)
            return end, [stop]
        pairs = zip(earlier, plain, strict=False)
        common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return (common, [common]) if common.strip() else nothing

    def _first_mark(self, text: str) -> tuple[str, str, int]:
        """The text before the first mark, the mark, and its id; both empty if there is none."""
        tokens, starts = encode_with_starts(self._tokenizer, text)
        for token, start, end in zip(tokens, starts, [*starts, len(text)][1:], strict=True):
            # Some tokenizers have added tokens for spaces, which mark nothing.
            if token in self._tokenizer.added_tokens_decoder and text[start:end].strip():
                return text[:start], text[start:end], token
        return text, "", 0

    def _marked_spans(self, messages: Sequence[Message], text: str) -> dict[int, Span]:
        """Runs of generated tokens, one per assistant message; none if they do not match up."""
        encoded = self._tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in messages],
            tokenize=True,
            tools=self._tools,
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
        before, found, after = self._text(changed).partition(marker)
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
        return start, end
