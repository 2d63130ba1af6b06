"""Room on the state's disk for what must be noted even when it is full: what becomes of calls that
were accepted, and deletions, which make room.
"""

import os
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 32 * 2**20
# On a small disk a fiftieth of what is free, and nothing new within a twentieth of the whole.
RESERVE_SHARE = 50
LOW_BYTES, LOW_SHARE = 4 * RESERVE_BYTES, 20


class Reserve:
    """A file that takes up the room until it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "reserve"

    def hold(self) -> None:
        """Takes the room, unless it is held, or the disk is nearly full."""
        if self.low or self._file.exists():
            return
        disk = os.statvfs(self._folder)
        size_bytes = min(RESERVE_BYTES, disk.f_bavail * disk.f_frsize // RESERVE_SHARE)
        with suppress(OSError), self._file.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)

    def release(self) -> bool:
        """Gives the room to the disk. Returns whether there was any."""
        try:
            self._file.unlink()
        except OSError:
            return False
        return True

    @property
    def low(self) -> bool:
        """Whether so little is free that nothing new may be begun."""
        disk = os.statvfs(self._folder)
        least = min(LOW_BYTES, disk.f_blocks * disk.f_frsize // LOW_SHARE)
        return disk.f_bavail * disk.f_frsize < least
