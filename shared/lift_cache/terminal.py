"""How every command ends: a mistake is one line and status 2, Ctrl-C one line and status 130."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from cyclopts import App, CycloptsError
from pydantic import ValidationError

from lift_cache.errors import LiftError

USER_ERROR, INTERRUPTED = 2, 130


@contextlib.contextmanager
def ending_in_one_line(interrupted: str) -> Iterator[None]:
    """Turn what a user did wrong, or Ctrl-C, into one line and an exit status.

    Args:
        interrupted: said after Ctrl-C: what is left, and how to go on. A KeyboardInterrupt that carries a
            text of its own says that instead.

    Raises:
        SystemExit
    """
    try:
        yield
    except CycloptsError as error:
        _end(f"error: {one_line(error)}", USER_ERROR)
    except LiftError as error:
        _end(f"error: {error}", USER_ERROR)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"error: {where}{error.strerror or error}", USER_ERROR)
    except KeyboardInterrupt as stop:
        _end(f"interrupted: {stop if str(stop) else interrupted}", INTERRUPTED)


def run_app(app: App, argv: Sequence[str] | None) -> int:
    """Parse and run; returns the command's exit status. Raises CycloptsError on wrong arguments."""
    app.suppress_keyboard_interrupt = False  # Ctrl-C is answered above
    arguments = None if argv is None else list(argv)
    return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0


def run_command(app: App, argv: Sequence[str] | None, *, interrupted: str) -> None:
    """Both of the above, for an entry point. Raises SystemExit with any status but 0."""
    with ending_in_one_line(interrupted):
        status = run_app(app, argv)
    if status:
        sys.exit(status)


def one_line(error: CycloptsError) -> str:
    """What is wrong with the arguments: the flag, what was expected, what was given."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return " ".join(str(error).split())
    first = cause.errors()[0]
    flag = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"][:1])
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = isinstance(given, str | int | float) and repr(given) not in message
    return f"{flag}{message}" + (f" (given {given!r})" if shown else "")


def _end(said: str, status: int) -> NoReturn:
    print(said, file=sys.stderr)
    sys.exit(status)
