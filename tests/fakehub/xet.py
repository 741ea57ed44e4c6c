"""Xet without its servers: hf_xet keeps its store in a folder where the URL it is given says `local://`.

A process that uses such a folder locks it, so each token that is asked for names a folder of its own: an empty one to write to, a
clone of all that is there to read from. The Hub copies what was uploaded, once it is committed, to a store that only it uses.
"""

import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hf_xet  # type: ignore[import-untyped]

RECORD_NBYTES = 48
END_OF_FILES = b"\xff" * 32
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
CHANGING = ".redb"  # the store's index, written in place; all other files are written once


@dataclass(frozen=True)
class XetFile:
    """A file that was uploaded: what a shard says of it."""

    xet_hash: str
    sha256: str | None
    nbytes: int


class XetStore:
    """Below one folder: `own`, and a folder for each token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = folder / "own"
        self.own.mkdir(parents=True, exist_ok=True)

    def writing_url(self) -> str:
        return _url(self._new_folder())

    def reading_url(self) -> str:
        return _url(self._clone(self.own))

    def add(self, path: Path) -> str:
        """Put a file where readers find it; its Xet hash."""
        with hf_xet.XetSession().new_upload_commit(endpoint=_url(self.own)) as upload:
            handle = upload.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
        return str(handle.result().xet_info.hash)

    def fetch(self, sha256: str, target: Path) -> bool:
        """Write what someone uploaded to `target`; False where nobody did."""
        for shard in self.folder.glob("*/xet/xorbs/shards/*.mdb"):
            for file in read_shard(shard.read_bytes()):
                if file.sha256 == sha256:
                    with hf_xet.XetSession().new_file_download_group(
                        endpoint=_url(self._clone(shard.parents[3]))
                    ) as group:
                        group.start_download_file(hf_xet.XetFileInfo(file.xet_hash, file.nbytes), str(target))
                    return True
        return False

    def _new_folder(self) -> Path:
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def _clone(self, folder: Path) -> Path:
        clone = self._new_folder()
        shutil.copytree(folder, clone, copy_function=_link_or_copy, dirs_exist_ok=True)
        return clone


def read_shard(data: bytes) -> Iterator[XetFile]:
    """The files of a shard, by the specification at hf.co/docs/xet/shard: a header, then for each file runs of 48 bytes."""
    at = RECORD_NBYTES
    while data[at : at + 32] != END_OF_FILES:
        flags, count = struct.unpack_from("<II", data, at + 32)
        entries = range(at + RECORD_NBYTES, at + RECORD_NBYTES * (1 + count), RECORD_NBYTES)
        nbytes = sum(struct.unpack_from("<I", data, entry + 36)[0] for entry in entries)
        after = at + RECORD_NBYTES * (1 + count + (count if flags & WITH_VERIFICATION else 0))
        sha256 = _hash(data[after : after + 32]) if flags & WITH_METADATA else None
        yield XetFile(_hash(data[at : at + 32]), sha256, nbytes)
        at = after + (RECORD_NBYTES if flags & WITH_METADATA else 0)


def _hash(stored: bytes) -> str:
    """Hashes are stored as four little-endian words, and written as four big-endian ones."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", stored))


def _link_or_copy(source: str, target: str) -> None:
    (shutil.copyfile if source.endswith(CHANGING) else os.link)(source, target)


def _url(folder: Path) -> str:
    return f"local://{folder}"
