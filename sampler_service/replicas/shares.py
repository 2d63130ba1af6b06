"""What each tenant has had of all replicas: an engine, which gives its next tokens to the tenant
that has had the least, is told it with each request, and counts on from there.
"""

from collections import Counter


class Shares:
    """Tokens of requests that have ended. A tenant that had none under way begins where those are
    that have: who wanted nothing has saved nothing.
    """

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()  # of those with requests under way
        self._requests: Counter[str] = Counter()
        self._reached = 0  # the least of those who had some under way; without any, the most

    def begin(self, tenant: str) -> int:
        """Notes a request, and returns what its tenant has had."""
        if self._tokens:
            self._reached = max(self._reached, min(self._tokens.values()))
        self._tokens[tenant] = max(self._tokens[tenant], self._reached)
        self._requests[tenant] += 1
        return self._tokens[tenant]

    def end(self, tenant: str, tokens: int) -> None:
        """Notes that one has ended, for which so many tokens were computed."""
        self._tokens[tenant] += tokens
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            had = self._tokens.pop(tenant)
            del self._requests[tenant]
            if not self._tokens:
                self._reached = max(self._reached, had)
