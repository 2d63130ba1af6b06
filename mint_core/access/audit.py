"""The record of what was changed: who, what, when, and what came of it, as lines of JSON."""

import json
import logging
import logging.handlers
from datetime import UTC, datetime
from pathlib import Path

from mint_core.errors import FailedPrecondition


class AuditLog:
    """Of one file, which is opened anew when it has been moved away. Lines are never changed."""

    def __init__(self, file: Path) -> None:
        """Raises FailedPrecondition if it cannot be written."""
        try:
            handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
        except OSError as error:
            raise FailedPrecondition(
                f"`audit_log` {file} cannot be written: {error.strerror}; choose another"
            ) from error
        file.chmod(0o600)
        self._logger = logging.Logger("audit")
        self._logger.addHandler(handler)

    def note(self, **what: object) -> None:
        """Adds a line; with the time, in UTC."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._logger.info(json.dumps({"time": time, **what}, ensure_ascii=False, default=str))
