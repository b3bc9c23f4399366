"""Manages the checkpoints in a run's folder, and locks the folder for one process."""

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ssd_addon import _checks, storage

NEWEST = "checkpoint.pt"


class Checkpoints:
    """The latest checkpoints in a folder: checkpoint.pt is the newest, checkpoint-STEP.pt are earlier ones.

    A new one is written under a temporary name, flushed to disk and renamed, so that a complete checkpoint exists
    whenever the process or the machine stops.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> kept = Checkpoints(folder, keep=2)
    >>> for step in (10, 20, 30):
    ...     kept.save(step, lambda path: path.write_text(str(step)) and None)
    >>> [path.name for path in kept.there()]
    ['checkpoint.pt', 'checkpoint-20.pt']

    Args:
        folder: the run's folder.
        keep: number of checkpoints to keep, including the newest.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), _checks.count(keep, "keep", 1)
        self.newest = self.folder / NEWEST
        self._step: int | None = None  # step of the newest, if it is known to be complete

    def there(self) -> list[Path]:
        """Paths of the existing checkpoints, newest first."""
        older = [(step, p) for p in self.folder.glob("checkpoint-*.pt") if (step := _step_of(p)) is not None]
        return [*([self.newest] if self.newest.is_file() else []), *(p for _, p in sorted(older, reverse=True))]

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write the newest checkpoint, keep the previous ones, and remove those beyond `keep`.

        Args:
            step: the training step.
            write: writes a file to the path that it is given, such as with `runs.save_run`. If it writes none, as on
                ranks other than 0, nothing changes.

        Raises:
            OSError: the disk is full or the path cannot be written; existing checkpoints are kept.
        """
        step = _checks.count(step, "step")
        before, beside = self._step, self.folder / f".{NEWEST}.{os.getpid()}.new"
        try:
            write(beside)
            if not beside.is_file():
                return
            if before is not None and before != step and self.keep > 1 and self.newest.is_file():
                _also(self.newest, self.folder / f"checkpoint-{before}.pt")
            os.replace(beside, self.newest)
        finally:
            beside.unlink(missing_ok=True)
        storage.sync_folder(self.folder)
        self._step = step
        (self.folder / f"checkpoint-{step}.pt").unlink(
            missing_ok=True
        )  # from before the run was resumed at an earlier step
        for path in [p for p in self.there() if p != self.newest][self.keep - 1 :]:
            path.unlink(missing_ok=True)

    def restore(
        self, read: Callable[[Path], Mapping[str, Any]], say: Callable[[str], None] | None = None
    ) -> Mapping[str, Any] | None:
        """Resume from the newest checkpoint that is complete; None if there are no checkpoints.

        Incomplete files of a killed process are removed.

        Args:
            read: loads a file into the training and returns its content with "step", such as with `runs.restore_run`.
            say: called with a message for each damaged file that is skipped.

        Raises:
            storage.Damaged: no existing checkpoint can be read.
            ValueError: `read` refuses a file for another reason, such as another configuration.
        """
        for left in self.folder.glob(".*checkpoint*.pt.*"):  # left by a process that was killed while writing
            left.unlink(missing_ok=True)
        there, reasons = self.there(), []
        for path in there:
            try:
                content = read(path)
            except storage.Damaged as error:
                reasons.append(str(error))
                if say is not None:
                    say(f"skipped: {error}")
                continue
            self._step = int(content["step"]) if path == self.newest else None
            if say is not None:
                say(f"continuing from {path}, step {content['step']}")
            return content
        if there:
            raise storage.Damaged(f"{self.folder}: expected a checkpoint that can be read: got {'; '.join(reasons)}")
        return None


def _step_of(path: Path) -> int | None:
    text = path.stem.removeprefix("checkpoint-")
    return int(text) if text.isdigit() else None


def _also(path: Path, other: Path) -> None:
    """Make a file available under another name too, by a link or a copy."""
    beside = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(path, beside)
        except OSError:  # a file system without links
            shutil.copy2(path, beside)
        os.replace(beside, other)
        storage.sync_folder(other.parent)
    finally:
        beside.unlink(missing_ok=True)


class Lock:
    """Lets only one process write to a run's folder; the lock is released when the process ends, however it ends.

    >>> import tempfile
    >>> with Lock(tempfile.mkdtemp()):
    ...     pass

    Raises:
        BlockingIOError: another process holds the lock; the message says which.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / ".lock"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = open(self.path, "a+")  # noqa: SIM115  held as long as the lock
        if not _locked(self._file):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise BlockingIOError(
                f"{self.path.parent}: expected a folder to which no other run writes: got one in use by {owner}; wait "
                "for it or end it, or choose another folder"
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locked(file: Any) -> bool:
    """Lock an open file; False if another process has locked it. Does nothing on systems without such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True
