"""Structured logs: one JSON object a line on stderr, never with the text of a caption."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

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
        lines = getattr(record, "lines", None)
        if lines is not None:
            return "\n".join(_encode(_head(record, at) | fields) for at, fields in lines)
        entry = _head(record, record.created)
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


def info_lines(logger: logging.Logger, message: str, lines: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Log several lines at INFO for the price of one: each its time (unix seconds) and what `extra` would be.

    They are one record, with attribute `lines`. Nothing is added to them, not the id of a request either.
    """
    if logger.isEnabledFor(logging.INFO):
        # Not logger.info, which would walk the stack to find the caller.
        extra = {"lines": lines}
        logger.handle(
            logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, (), None, extra=extra)
        )


def _head(record: logging.LogRecord, at: float) -> dict[str, object]:
    return {
        "time": f"{_second(int(at))}.{int(at % 1 * 1000):03}+00:00",
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }


@lru_cache(maxsize=4)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _without_words(error: BaseException, below: tuple[BaseException, ...] = ()) -> str:
    """A traceback in which exceptions say their type alone: causes first, members of a group last."""
    parts: list[str] = []
    below = (*below, error)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and cause not in below:
        parts.append(_without_words(cause, below))
    kind = type(error)
    parts += [*traceback.format_tb(error.__traceback__), f"{kind.__module__}.{kind.__qualname__}"]
    if isinstance(error, BaseExceptionGroup):
        parts += [_without_words(member, below) for member in error.exceptions]
    return "\n".join(part.rstrip("\n") for part in parts)


def configure(level: str = "INFO") -> None:
    """Send everything to stderr as JSON lines; libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for ours in ("lift_embedder", "lift_cache"):
        logging.getLogger(ours).setLevel(level)
