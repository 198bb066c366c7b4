"""A lock that is a file: held by one process, and free again when that process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class FileLock:
    """A lock that is held; ``descriptor`` None: this file system knows no locks."""

    path: Path
    descriptor: int | None

    def release(self) -> None:
        """Give it back and take the file away: first the file, while nobody else can hold its lock."""
        if self.descriptor is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()
            os.close(self.descriptor)


def try_lock(path: Path) -> FileLock | None:
    """Take the lock on the file ``path``, which is made if there is none; None if another one holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS_HERE:
                return FileLock(path, None)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return FileLock(path, descriptor)
        os.close(descriptor)  # its holder has just taken the file away: what is locked now has no name
