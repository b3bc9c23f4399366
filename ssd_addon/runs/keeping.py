"""The checkpoints of a run in its folder: the newest, the ones before it, and who may write there."""

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
    """The last checkpoints in a folder: checkpoint.pt is the newest, checkpoint-STEP.pt are the ones before it.

    A new one is written beside its place, synchronized with the disk and renamed, so that whenever the process or the
    machine stops, there is a whole one.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> kept = Checkpoints(folder, keep=2)
    >>> for step in (10, 20, 30):
    ...     kept.save(step, lambda path: path.write_text(str(step)) and None)
    >>> [path.name for path in kept.there()]
    ['checkpoint.pt', 'checkpoint-20.pt']

    Args:
        folder: of the run.
        keep: how many, with the newest.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), _checks.count(keep, "keep", 1)
        self.newest = self.folder / NEWEST
        self._step: int | None = None  # of the newest, where it is known to be whole

    def there(self) -> list[Path]:
        """Those that are there, the newest first."""
        older = [(step, p) for p in self.folder.glob("checkpoint-*.pt") if (step := _step_of(p)) is not None]
        return [*([self.newest] if self.newest.is_file() else []), *(p for _, p in sorted(older, reverse=True))]

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write the newest one, keep the one before it, and remove what is beyond `keep`.

        Args:
            step: of the training.
            write: writes a file at the path that it is given, such as `runs.save_run`. Where it writes none, as on
                ranks other than 0, nothing is changed.

        Raises:
            OSError: the disk is full, or the place cannot be written; what was there stays.
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
        (self.folder / f"checkpoint-{step}.pt").unlink(missing_ok=True)  # of a run that went back to this step
        for path in [p for p in self.there() if p != self.newest][self.keep - 1 :]:
            path.unlink(missing_ok=True)

    def restore(
        self, read: Callable[[Path], Mapping[str, Any]], say: Callable[[str], None] | None = None
    ) -> Mapping[str, Any] | None:
        """Continue from the newest checkpoint that is whole; None where there is none at all. What a killed process
        left half written is removed.

        Args:
            read: loads a file into the training and returns what is in it, with its "step"; such as `runs.restore_run`.
            say: called with a line on each damaged file that is passed over.

        Raises:
            storage.Damaged: none of those that are there can be read.
            ValueError: what `read` refuses for another reason, such as another configuration.
        """
        for left in self.folder.glob(".*checkpoint*.pt.*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        there, reasons = self.there(), []
        for path in there:
            try:
                content = read(path)
            except storage.Damaged as error:
                reasons.append(str(error))
                if say is not None:
                    say(f"passed over: {error}")
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
    """The same file under another name too."""
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
    """One process at a time writes to a run's folder; the lock is gone when its process is, however it ends.

    >>> import tempfile
    >>> with Lock(tempfile.mkdtemp()):
    ...     pass

    Raises:
        BlockingIOError: another process has the folder; says which.
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
                f"{self.path.parent}: expected a folder that no other run writes to: got one in use by {owner}; wait "
                "for it or end it, or choose another folder"
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        """Release it."""
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locked(file: Any) -> bool:
    """Lock an open file; False where somebody else has it. On systems without such locks nothing is locked."""
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
