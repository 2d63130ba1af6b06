"""How long revisions are kept.

- A named revision with a TTL: until its `expire_time`; the newest without one: until deleted.
- A revision that a newer one of its name has followed: 24 h after its last use.
- An unnamed snapshot: 24 h after its last use, or until its `expire_time` if that is later. Its
  copy in memory, if there is one, goes at its `expire_time`.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import zip_longest

from checkpoint_store.manifest import UNUSED_LIMIT_S, Manifest


def past_expiry(manifest: Manifest, now: datetime) -> bool:
    """Whether a named revision's time is over: readers no longer find it, swept or not."""
    return manifest.named and past_memory(manifest, now)


def past_memory(manifest: Manifest, now: datetime) -> bool:
    """Whether the copy in memory is no longer to be used; its time does not end the stored one."""
    return manifest.expire_time is not None and manifest.expire_time <= now


def removable(
    revisions: Sequence[Manifest], last_used: Sequence[datetime | None], now: datetime
) -> list[int]:
    """Places of what a sweep may remove, of all revisions of a name in order."""
    following = [manifest.create_time for manifest in revisions[1:]]
    times = zip_longest(revisions, following, last_used)
    return [
        at
        for at, (manifest, followed, used) in enumerate(times)
        if _is_removable(manifest, followed, used, now=now)
    ]


def expiries(manifests: Iterable[Manifest], now: datetime) -> list[datetime]:
    """When the times of named revisions will be over that have not passed."""
    times = (manifest.expire_time for manifest in manifests if manifest.named)
    return [time for time in times if time is not None and time > now]


def _is_removable(
    manifest: Manifest, followed: datetime | None, last_used: datetime | None, *, now: datetime
) -> bool:
    """`followed` is when the next one was published."""
    if past_expiry(manifest, now):
        return True
    if manifest.named and followed is None:
        return False
    limit_s = UNUSED_LIMIT_S if manifest.unused_limit_s is None else manifest.unused_limit_s
    end = _latest(manifest.create_time, followed, last_used) + timedelta(seconds=limit_s)
    return _latest(end, None if manifest.named else manifest.expire_time) <= now


def _latest(time: datetime, *others: datetime | None) -> datetime:
    return max(time, *(other for other in others if other is not None), time)
