"""Reads files of torch.save and verifies their checksums; errors say why a file cannot be read."""

import collections
import io
import os
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_OLD_FORMAT = b"l\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of files that torch.save wrote before 1.6 or with _use_new_zipfile_serialization=False."""


def load(path: str | Path, map_location: Any, *, leave_out: bool = False) -> Any:
    """Load a file as torch.load does with weights_only=True, and verify its checksums; see `storage.read`.

    Args:
        path: path of the file.
        map_location: device for the tensors.
        leave_out: replace everything that is neither a tensor nor plain data, such as hyperparameters, by an `Inert`
            object instead of refusing the file. No code in the file is run either way.
    """
    with open(path, "rb") as file:
        return _loaded(file, map_location, leave_out)


class Inert:
    """Placeholder for an object that was left out; accepts every operation of a pickle and does nothing."""

    dump_patches = False  # torch.load reads it of a pickled module

    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...
    def __call__(self, *arguments: Any, **options: Any) -> "Inert":
        return self


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
"""The functions and classes in a file of tensors, which create nothing but tensors."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return KNOWN.get((module, name), Inert)


class _Pickle:
    """The pickle module that is passed to torch.load."""

    Unpickler = _Unpickler
    load = staticmethod(lambda file, **options: _Unpickler(file, **options).load())
    __name__ = "pickle"


def reason(error: Exception) -> str:
    """Why `load` failed, in one line."""
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error):
        return "it contains more than tensors and plain data, which could run code on loading"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or pickled with another protocol than that of torch.save"
    text = str(error).partition("\n")[0]
    return text if isinstance(error, _Unreadable) else f"{type(error).__name__}: {text[:200]}".removesuffix(": ")


def _loaded(file: io.BufferedReader, map_location: Any, leave_out: bool = False) -> Any:
    start = file.read(64)
    file.seek(0)
    if not start.startswith(b"PK\x03\x04"):
        if _OLD_FORMAT not in start:
            raise _Unreadable(f"it is not a file of torch.save: {_kind(start)}")
        if not leave_out:
            return torch.load(file, map_location=map_location, weights_only=True, mmap=False)
        with warnings.catch_warnings():  # that the source of a pickled module, which is left out, is another one
            warnings.simplefilter("ignore")
            held = io.BytesIO(file.read())  # of a file on a disk torch would try whether it is a tar archive
            return torch.load(held, map_location=map_location, mmap=False, **_how(leave_out))
    try:
        checked = _Checked(file)
    except zipfile.BadZipFile as error:
        raise _Unreadable("the end of its archive is missing or damaged, as in a file that was cut off") from error
    _refuse_torchscript(file)
    try:
        return torch.load(checked, map_location=map_location, mmap=False, **_how(leave_out))  # type: ignore[arg-type]
    finally:
        checked.verify()  # also if loading failed, as damage is the best explanation


def _how(leave_out: bool) -> dict[str, Any]:
    return {"pickle_module": _Pickle, "weights_only": False} if leave_out else {"weights_only": True}


def _refuse_torchscript(file: io.BufferedReader) -> None:
    """torch.load would hand such a file to torch.jit.load, which runs the code in it."""
    try:
        records = torch._C.PyTorchFileReader(file).get_all_records()  # by the reader that torch.load decides with
    except RuntimeError:  # damaged, as torch.load will say too
        records = []
    file.seek(0)
    if "constants.pkl" in records:
        raise _Unreadable("it is a TorchScript archive, which holds code: save the module's state_dict() instead")


class _Unreadable(Exception):
    """An error that says why a file cannot be read."""


class _Checked(io.RawIOBase):
    """An archive, opened for reading, whose entries are compared with their checksums as they are read.

    torch.load reads an entry of weights in order, in one or more pieces; `verify` reads everything else.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.damaged = ""  # the entry whose checksum does not match
        self.todo: dict[int, tuple[zipfile.ZipInfo, int, int]] = {}  # next offset -> the entry, bytes left, checksum
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.CRC and entry.compress_type == zipfile.ZIP_STORED:  # 0: written without checksums
                    file.seek(entry.header_offset + 26)  # the lengths of name and extra field, before the data
                    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                    begin = entry.header_offset + 30 + name + extra
                    self.todo[begin] = entry, entry.file_size, 0
        file.seek(0)

    def readinto(self, buffer: Any) -> int:
        at = self.file.tell()
        count = self.file.readinto(buffer)
        if at in self.todo and count <= self.todo[at][1]:
            entry, left, crc = self.todo.pop(at)
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
            if count < left:
                self.todo[at + count] = entry, left - count, crc
            elif crc != entry.CRC:
                self.damaged = entry.filename
        return count

    def verify(self) -> None:
        """Read and compare the entries that were not read completely."""
        buffer = bytearray(2**20)
        while self.todo:
            at, (_, left, _) = next(iter(self.todo.items()))
            self.file.seek(at)
            if not self.readinto(memoryview(buffer)[:left]):
                raise _Unreadable("it is damaged: an entry of its archive is shorter than its length")
        if self.damaged:
            raise _Unreadable(f"it is damaged: the checksum of its entry {self.damaged!r} does not match")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _kind(start: bytes) -> str:
    """What kind of file it is, from its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer of a file that Git LFS has not downloaded (git lfs pull)"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is an HTML page"
    if start[8:10] == b'{"':
        return "it is a safetensors file, which cannot contain the heads' configuration"
    return f"it starts with {start[:16]!r}" if start else "it is empty"
