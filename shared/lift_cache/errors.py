"""Every error that a user, a file or another machine can cause.

`str(error)` is one line for a person: what was wrong, where, and what to do. Command lines print it and
exit with status 2; the server maps the type to an HTTP status.
"""

from __future__ import annotations


class LiftError(Exception):
    """Base of all expected errors; its text is one line meant for the user."""


class BadConfig(LiftError):
    """A flag, environment variable or YAML field that cannot be used."""


class BadSource(LiftError):
    """A source of captions or images that is missing, empty or unreadable."""


class BadCaption(LiftError):
    """A caption that is empty, not text, not valid UTF-8, or longer than is allowed."""


class MissingCaptions(LiftError):
    """Captions that were asked for and are not in the snapshot."""


class CacheNotFound(LiftError):
    """No cache, or no such snapshot, at the given path."""


class CacheDamaged(LiftError):
    """Bytes on disk that are not the bytes that were written."""


class CacheLocked(LiftError):
    """Another process is the writer of this cache."""


class CacheFull(LiftError):
    """The disk under the cache has no room; nothing of the refused write was kept."""


class StorageFailed(LiftError):
    """The disk under the cache could not write or read; nothing of what failed was acknowledged."""


class UnsupportedFormat(LiftError):
    """A file written by a newer version of this software."""


class UnsafeFileSystem(LiftError):
    """A file system on which the writer cannot keep its promise."""


class RecipeMismatch(LiftError):
    """Two recipes that were required to be equal are not.

    Attributes:
        field: name of the first field that differs.
        ours, theirs: its two values.
    """

    def __init__(self, message: str, *, field: str, ours: object, theirs: object) -> None:
        super().__init__(message)
        self.field, self.ours, self.theirs = field, ours, theirs


class EncodingMismatch(LiftError):
    """Two encodings that were required to be equal are not."""


class VectorRejected(LiftError):
    """A vector that may not be stored: NaN, zero, beyond the dtype's range, or of another dimension."""


class ModelNotFound(LiftError):
    """A model that is neither a known name, a local folder, nor to be had from the hub."""


class EngineUnavailable(LiftError):
    """The embedding engine is not running; cached captions can still be served."""


class ServerUnavailable(LiftError):
    """An embedding server or an object store cannot be reached, or keeps refusing."""
