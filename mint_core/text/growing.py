"""Text that grows with its tokens."""

from mint_core.text.process import TextProcess

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a character of which bytes are missing


class GrowingText:
    """Of one sequence. Tokens are decoded beside those before them, on which their text may depend,
    and told once they make whole characters.
    """

    def __init__(self, process: TextProcess, tenant: str) -> None:
        self._process = process
        self._tenant = tenant
        self._tokens: list[int] = []  # those told last, and behind them those that are not
        self._told = 0

    async def add(self, tokens: list[int], *, last: bool) -> str:
        """What is new of the text. `last`: no more tokens come."""
        self._tokens += tokens
        before, now = await self._process.texts(
            self._tenant, [self._tokens[: self._told], self._tokens]
        )
        if now.endswith(_BROKEN) and not last:
            return ""
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return now[len(before) :]
