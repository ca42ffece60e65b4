"""A run folder belongs to one run at a time."""

import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class Claim:
    """Holds a run folder for this process alone, as a context; the claim ends with the process, however that ends.

    The lock is one of POSIX, which network file systems know too, and which workers of loaders do not inherit. Windows
    has none: there a note asks the user to start no second run.

    Args:
        folder: Created if need be.

    Raises:
        ValueError: If another process holds it.
        OSError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / LOCK).open("a+")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.file.seek(0)
                owner = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(
                    f"{folder}: another run writes to it, {owner}: wait for its end, or choose another folder with --out"
                ) from None
            print(f"{folder}: cannot be locked here ({error.strerror}): start no second run in it", file=sys.stderr)
        with contextlib.suppress(OSError):  # on a full disk nobody reads it
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            self.file.flush()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None) -> None:
        self.file.close()

    def check(self) -> None:
        """Make sure that the folder is still the one that was claimed.

        Raises:
            FileNotFoundError: If it was removed or replaced; what is written now would be a part of a run.
        """
        try:
            same = os.path.samestat((self.folder / LOCK).stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise FileNotFoundError(
                f"{self.folder}: was removed or replaced while the run was writing to it: put it back and continue with "
                "--resume, or begin again"
            )
