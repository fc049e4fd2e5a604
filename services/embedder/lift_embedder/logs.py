"""Structured logs: one JSON object a line on stderr, never with the text of a caption."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "color_message",
    "asctime",
    "taskName",
    "vllm_process_name",
}

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that runs here; asyncio hands it on to tasks and threads that a request starts."""

_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, `request` while one runs, and whatever was passed as `extra`.

    While a request runs, a traceback has its frames and the types of its exceptions and not what these say:
    libraries quote in their messages what they stumbled over, and here that is a caption.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = request_id.get()
        if request is not None:
            entry["request"] = request
        entry |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            full = request is None
            entry["exception"] = (
                self.formatException(record.exc_info) if full else _without_words(record.exc_info[1])
            )
        return _encode(entry)


def _without_words(error: BaseException) -> str:
    """A traceback in which exceptions say their type alone, causes first."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    parts = []
    for one in reversed(chain):
        kind = type(one)
        frames = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"{frames}{kind.__module__}.{kind.__qualname__}")
    return "\n".join(parts)


def configure(level: str = "INFO") -> None:
    """Send everything to stderr as JSON lines; libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for ours in ("lift_embedder", "lift_cache"):
        logging.getLogger(ours).setLevel(level)
