"""What the scheduler orders and the runner computes: sequences, and the parts of them that make up
a pass.
"""

from dataclasses import dataclass, field

from sampler_service.engine.cache.blocks import BLOCK_TOKENS, next_key

PROMPT = -1  # index of the sequence that a request's samples fork from


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A prompt, or a prompt with what one sample has generated."""

    request_id: int
    index: int  # which sample, or PROMPT
    adapter: str
    prompt: list[int]  # shared by the samples
    tenant: str = ""
    # Blocks of others serve for so many tokens, the following are scored; None: for all.
    reusable: int | None = None
    keys: list[bytes] = field(default_factory=list)  # of what comes first, and of the full blocks
    generated: list[int] = field(default_factory=list)
    cached: int = 0  # so many tokens have their keys and values in `blocks`
    blocks: list[int] = field(default_factory=list)
    state: int | None = None  # slot of the state after those tokens, where layers have one
    room: int = 0  # so many tokens may be written without asking for a block
    paid: int = 0  # so many tokens were charged to the tenant: computing them again is free
    hit_tokens: int | None = None  # of the prompt, found computed when it first began
    decodes: bool = False  # whether only the last token is to be computed, and the next one drawn
    line: "list[TokenSequence] | None" = None  # where it waits or runs, among others
    age: tuple[int, int] = field(init=False)  # requests are numbered as they come; less is older

    def __post_init__(self) -> None:
        self.age = (self.request_id, self.index)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def missing(self) -> int:
        """Tokens to compute before the last one."""
        return len(self) - 1 - self.cached

    def tokens(self, start: int, stop: int) -> list[int]:
        n = len(self.prompt)
        if start >= n:
            return self.generated[start - n : stop - n]
        return self.prompt[start:stop] + self.generated[: max(stop - n, 0)]

    def key(self, block: int) -> bytes:
        """Of its full block of that place."""
        while len(self.keys) <= block + 1:
            start = (len(self.keys) - 1) * BLOCK_TOKENS
            self.keys.append(next_key(self.keys[-1], self.tokens(start, start + BLOCK_TOKENS)))
        return self.keys[block + 1]

    def keys_before_last(self, start: int) -> list[bytes]:
        """Of the blocks from `start` on that come before its last token: the full ones, and what
        is left of a prompt, so that of the same prompt again nothing is computed.
        """
        end = len(self) - 1
        full = end // BLOCK_TOKENS
        keys = [self.key(block) for block in range(start, full)]
        if self.index == PROMPT and end % BLOCK_TOKENS:
            before = self.key(full - 1) if full else self.keys[0]
            keys.append(next_key(before, self.tokens(full * BLOCK_TOKENS, end)))
        return keys


@dataclass(slots=True)  # not frozen, which takes three times as long: one is made per token
class Span:
    """Tokens of a sequence to compute now."""

    sequence: TokenSequence
    start: int
    stop: int
    decodes: bool  # one token, whose successor is drawn


@dataclass(slots=True)
class Copies:
    """To be made before a pass, (from, to), in order."""

    blocks: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass. `copies` of blocks, and those of states, (from, to) come first, in order."""

    spans: tuple[Span, ...]
    copies: tuple[tuple[int, int], ...] = ()
    state_copies: tuple[tuple[int, int], ...] = ()
