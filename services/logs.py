"""Structured logs: with ``MTPD_LOG=json`` what is said, and what becomes of each unit, goes to stderr, a JSON object a line.

Actors and training workers write theirs to Ray's logs of their node, where a cluster's collector finds them. Without it people
read what the commands print, and events of single units are not written.
"""

import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from typing import Any

_VARIABLE = "MTPD_LOG"
_log = logging.getLogger("mtpd")


class JsonLines(logging.Formatter):
    """A record as one line: time (UTC), level, message, host, pid, and the fields that the event has."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "host": socket.gethostname(),
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def style() -> str:
    """How this process writes its logs: ``json``, or empty for people; given to the processes that work for it."""
    return "json" if os.environ.get(_VARIABLE) == "json" else ""


def set_up(wanted: str) -> None:
    """Write logs in a style, in this process."""
    if wanted != "json" or _log.handlers:
        return
    os.environ[_VARIABLE] = wanted
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


def event(message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Something that happened, with the ids of what it happened to: ``teacher``, ``unit``, ``stage``."""
    if style():
        _log.log(level, message, extra={"fields": fields})
