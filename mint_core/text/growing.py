"""Text that grows with its tokens."""

from mint_core.text.process import TextProcess

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a character of which bytes are missing


class GrowingText:
    """Of one sequence. Tokens are decoded beside those before them, on which their text may depend,
    and characters told once they are whole: what has been told follows from the tokens alone, not
    from how they came.
    """

    def __init__(self, process: TextProcess, tenant: str) -> None:
        self._process = process
        self._tenant = tenant
        self._tokens: list[int] = []  # those told last, and behind them those that are not
        self._told = 0
        self._ahead = 0  # characters told of those that are not

    async def add(self, tokens: list[int], *, last: bool) -> str:
        """What is new of the text. `last`: no more tokens come."""
        self._tokens += tokens
        before, now = await self._process.texts(
            self._tenant, [self._tokens[: self._told], self._tokens]
        )
        whole = now if last else now.rstrip(_BROKEN)
        news = whole[len(before) + self._ahead :]
        if whole == now:
            self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
            self._ahead = 0
        else:
            self._ahead += len(news)
        return news
