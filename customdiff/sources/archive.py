"""Unpack untrusted zip and tar archives: images, masks and captions, inside their folder, within counted limits."""

import bz2
import gzip
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from customdiff.errors import UserError
from customdiff.images import brief
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused

MAX_MEMBERS = 100_000  # of an archive, whatever they are
CHUNK = 1 << 16
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


def unpack(archive: Path, into: Path, max_megabytes: float, *, key: str, subfolder: str | None = None) -> list[Refused]:
    """Unpack the images, masks and `.txt` captions of a zip or tar archive, and nothing else, into a new folder.

    Nothing is written outside `into`: a member whose name would lead there makes the whole archive refused.
    Links and devices are never made. What is unpacked is counted as it comes, whatever sizes headers claim.

    Args:
        max_megabytes: limit of the archive and, apart, of what it holds.
        key: the key of params.yaml that names the archive, for the messages of errors.
        subfolder: only members below it.

    Returns:
        Images that are links or devices, which were set aside.

    Raises:
        UserError: not a zip or tar, damaged, encrypted, unsafe or too large, or no image lies below `subfolder`.
    """
    size = archive.stat().st_size
    if size > max_megabytes * 1e6:
        raise UserError(f"{key}: the archive has {size / 1e6:.0f} MB, above download.max_megabytes ({max_megabytes:g})")
    kind = archive_kind(archive)
    if kind is None:
        raise UserError(f"{key}: {_not_an_archive(archive)}; give a zip, or a tar (plain, .gz, .bz2 or .xz)")
    into.mkdir(parents=True)
    unpacking = _Unpacking(key, into, PurePosixPath(subfolder or "").parts, int(max_megabytes * 1e6))
    try:
        if kind == "zip":
            _unpack_zip(archive, unpacking)
        else:
            _unpack_tar(archive, kind, unpacking)
    except DAMAGED as error:
        raise UserError(f"{key}: the archive is damaged or cannot be unpacked ({brief(error)})") from error
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"{key}: packed in a way that cannot be read here ({brief(error)}); pack it anew") from error
    if not unpacking.images:
        raise UserError(f"{key}: no image lies in {subfolder or 'the archive'}{unpacking.elsewhere()}")
    return unpacking.refused


def archive_kind(path: Path) -> str | None:
    """`zip`, `tar`, `gz`, `bz2` or `xz` by the file's content, None for anything else."""
    head = _head(path)
    for magic, kind in ((b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ\0", "xz")):
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        return "zip"
    return "tar" if head[257:262] == b"ustar" or tarfile.is_tarfile(path) else None


def _not_an_archive(path: Path) -> str:
    head = _head(path)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, not an archive"
    if head.startswith(b"PK"):
        return "the zip archive is damaged or cut short"
    return "it is neither a zip nor a tar archive"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


@dataclass
class _Unpacking:
    """What is to be unpacked where, how many bytes and members more may come, and what was found."""

    key: str
    into: Path
    prefix: tuple[str, ...]
    limit: int  # bytes
    members: int = 0
    spent: int = 0
    images: int = 0
    refused: list[Refused] = field(default_factory=list)
    outside: set[str] = field(default_factory=set)  # folders with images that `prefix` leaves out

    def spend(self, count: int) -> None:
        self.spent += count
        if self.spent > self.limit:
            raise UserError(
                f"{self.key}: unpacks to more than download.max_megabytes ({self.limit / 1e6:g}); "
                "raise it only if you trust the archive"
            )

    def wanted(self, name: str) -> tuple[str, ...]:
        """A member's name as the parts of a relative path; () where it is not to be unpacked.

        Raises:
            UserError: the name is absolute or climbs out with `..`, or there are too many members.
        """
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise UserError(f"{self.key}: the archive has more than {MAX_MEMBERS} members; unpack it yourself")
        parts = PurePosixPath(name.replace("\\", "/")).parts  # some Windows tools pack with backslashes
        if parts and (parts[0].startswith("/") or ".." in parts or re.match(r"^[A-Za-z]:", parts[0])):
            raise UserError(f"{self.key}: unsafe archive: its member {name!r} would be written outside its folder")
        if not parts or any(image_folder.is_hidden(part) for part in parts):
            return ()
        image = image_folder.is_image(parts[-1])
        if parts[: len(self.prefix)] != self.prefix:
            if image:
                self.outside.add("/".join(parts[:-1]) or "its top")
            return ()
        return parts if image or image_folder.is_mask(parts[-1]) or parts[-1].lower().endswith(".txt") else ()

    def refuse_special(self, parts: tuple[str, ...]) -> None:
        if image_folder.is_image(parts[-1]):
            self.refused.append(Refused("/".join(parts), "a link or a device, not a file"))

    def write(self, packed: IO[bytes], parts: tuple[str, ...], *, count: bool) -> None:
        path = self.into.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while chunk := packed.read(CHUNK):
                if count:
                    self.spend(len(chunk))
                file.write(chunk)
        self.images += image_folder.is_image(parts[-1])

    def elsewhere(self) -> str:
        shown = sorted(self.outside, key=image_folder.natural)
        more = ", ..." if len(shown) > 8 else ""
        return f"; images lie in: {', '.join(shown[:8])}{more}" if shown else ""


def _unpack_zip(archive: Path, unpacking: _Unpacking) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            parts = unpacking.wanted(member.filename)
            if member.is_dir() or not parts:
                continue
            if member.flag_bits & 0x1:
                raise UserError(
                    f"{unpacking.key}: the zip is encrypted ({member.filename}); give one without a password"
                )
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                unpacking.refuse_special(parts)
                continue
            with opened.open(member) as packed:
                unpacking.write(packed, parts, count=True)


def _unpack_tar(archive: Path, kind: str, unpacking: _Unpacking) -> None:
    openers: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with openers.get(kind, lambda path: path.open("rb"))(archive) as stream:
        counted = _Counted(stream, unpacking)
        with tarfile.open(fileobj=counted, mode="r|") as opened:  # type: ignore[call-overload]
            for member in opened:
                parts = unpacking.wanted(member.name)
                if member.isdir() or not parts:
                    continue
                packed = opened.extractfile(member) if member.isreg() and not member.issparse() else None
                if packed is None:
                    unpacking.refuse_special(parts)
                else:
                    unpacking.write(packed, parts, count=False)  # counted where it is read


class _Counted:
    """The plain tar inside an archive, every byte of it counted: headers and skipped members too."""

    def __init__(self, stream: IO[bytes], unpacking: _Unpacking) -> None:
        self.stream = stream
        self.unpacking = unpacking

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.unpacking.limit - self.unpacking.spent + 1))
        self.unpacking.spend(len(data))
        return data
