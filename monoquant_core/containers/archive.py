"""The zip archives of torch.save and torch.export: where their records lie. Imports no torch."""

from __future__ import annotations

import os
import zipfile
from typing import IO, cast

from monoquant_core.containers.entries import shown
from monoquant_core.containers.reader import FileReader, looks_like
from monoquant_core.errors import SourceError

MAGIC = b"PK\x03\x04"
_LOCAL_HEADER, _END = 30, 22  #: bytes of a record's own header, and of the end of the directory


class Archive:
    """The records of a zip file, found through its directory and checked against its bounds before use.

    :raises SourceError: when the directory is damaged, names a record twice, or records overlap.
    """

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader
        # Of the many places where zip programs look for a directory only the last is taken: a truncated archive may
        # hold whole ones.
        end_record = reader.read(max(0, reader.size - _END), min(_END, reader.size))
        if not end_record.startswith(b"PK\x05\x06") or not end_record.endswith(b"\0\0"):
            hint = "" if reader.read(0, min(4, reader.size)) == MAGIC else looks_like(reader)
            raise SourceError(f"{reader.path}: damaged zip archive: it does not end with its directory", hint=hint)
        try:
            with zipfile.ZipFile(cast("IO[bytes]", _Stream(reader))) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except SourceError:
            raise
        except Exception as exc:  # zipfile fails in many ways on a damaged directory
            raise SourceError(f"{reader.path}: damaged zip archive: {' '.join(str(exc).split())[:160]}") from exc
        if not infos:
            raise SourceError(f"{reader.path}: an empty zip archive")
        if min(info.header_offset for info in infos) != 0:
            raise SourceError(f"{reader.path}: damaged zip archive: it does not start with its first record")
        #: torch keeps everything below one folder, and takes the first record's
        self.root = infos[0].filename.partition("/")[0] + "/"
        self._infos: dict[str, tuple[zipfile.ZipInfo, int]] = {}
        infos.sort(key=lambda info: info.header_offset)
        for info, following in zip(infos, [*(i.header_offset for i in infos[1:]), end], strict=True):
            if info.filename in self._infos:
                raise SourceError(f"{reader.path}: record {shown(info.filename)} occurs twice")
            if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER + info.compress_size > following:
                raise SourceError(f"{reader.path}: record {shown(info.filename)} leaves its place in the file")
            self._infos[info.filename] = info, following

    def names(self) -> list[str]:
        """Names of the records, below the root folder."""
        return [n.removeprefix(self.root) for n in self._infos if n.startswith(self.root)]

    def __contains__(self, name: str) -> bool:
        return self.root + name in self._infos

    def place(self, name: str) -> tuple[int, int]:
        """Offset in the file and size of a record's bytes.

        :raises SourceError: when there is none, it is compressed or encrypted, or it leaves its place in the file.
        """
        path = self.reader.path
        if name not in self:
            raise SourceError(f"{path}: it has no record {shown(name)}")
        info, following = self._infos[self.root + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise SourceError(
                f"{path}: record {shown(name)} is compressed or encrypted",
                hint="torch stores records as they are: write the file again with torch.save or torch.export.save",
            )
        local = self.reader.read(info.header_offset, _LOCAL_HEADER, f"record {shown(name)}")
        offset = info.header_offset + _LOCAL_HEADER
        offset += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if not local.startswith(MAGIC) or offset + info.file_size > following:
            raise SourceError(f"{path}: record {shown(name)} leaves its place in the file")
        return offset, info.file_size

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a record.

        :raises SourceError: as :meth:`place`, and when it is larger than ``limit``.
        """
        offset, size = self.place(name)
        if size > limit:
            raise SourceError(f"{self.reader.path}: record {shown(name)} has {size} bytes, more than {limit}")
        return self.reader.read(offset, size, f"record {shown(name)}")

    def check_byte_order(self) -> None:
        """Refuse files of big-endian machines: their storages would have to be swapped, whatever their dtype.

        :raises SourceError: when the file does not say little-endian.
        """
        if "byteorder" in self and (order := self.read("byteorder", 1024)) != b"little":
            raise SourceError(
                f"{self.reader.path}: byte order {shown(order)}, only little-endian files are read",
                hint="load it with torch and save it again on this machine",
            )


class _Stream:
    """What zipfile needs of a file, never reading or allocating beyond its end."""

    def __init__(self, reader: FileReader) -> None:
        self._reader, self._position = reader, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size}[whence]
        if base + offset < 0:
            raise OSError("position before the start of the file")
        self._position = base + offset
        return self._position

    def read(self, nbytes: int = -1) -> bytes:
        left = max(0, self._reader.size - self._position)
        count = left if nbytes < 0 else min(nbytes, left)
        data = self._reader.read(self._position, count, "directory") if count else b""
        self._position += count
        return data

    def close(self) -> None:
        """The reader stays open."""
