"""Unpack untrusted zip and tar archives: images, masks and captions only, inside one folder, within size limits."""

import bz2
import gzip
import lzma
import re
import shutil
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

MAX_MEMBERS = 100_000  # members of one archive, of any kind
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


def unpack(archive: Path, into: Path, max_megabytes: float, *, key: str, subfolder: str | None = None) -> list[Refused]:
    """Unpack the images, masks and `.txt` captions of a zip or tar archive, and nothing else, into a new folder.

    An archive with a member whose name leads outside `into` is refused as a whole. Links and devices are never
    created. The number of bytes unpacked is limited, whatever sizes the headers claim.

    Args:
        max_megabytes: limit for the archive, and the same limit for its unpacked contents.
        key: the key of params.yaml that names the archive, for error messages.
        subfolder: unpack only members below this folder.

    Returns:
        Members with an image's name that are links or devices, which were skipped.

    Raises:
        UserError: not a zip or tar, damaged, encrypted, unsafe or too large, or no image below `subfolder`.
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
    except (NotImplementedError, RuntimeError) as error:  # zipfile's errors for methods that it does not support
        raise UserError(f"{key}: unsupported compression ({brief(error)}); pack the archive again") from error
    if not unpacking.images:
        raise UserError(f"{key}: no images in {subfolder or 'the archive'}{unpacking.elsewhere()}")
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
        return "the file is a web page, not an archive"
    if head.startswith(b"PK"):
        return "the zip archive is damaged or incomplete"
    return "the file is neither a zip nor a tar archive"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


@dataclass
class _Unpacking:
    """What to unpack, the limits, and the results so far."""

    key: str
    into: Path
    prefix: tuple[str, ...]
    limit: int  # bytes
    members: int = 0
    spent: int = 0  # bytes
    images: int = 0
    refused: list[Refused] = field(default_factory=list)
    outside: set[str] = field(default_factory=set)  # folders with images that are not below `prefix`

    def spend(self, count: int) -> None:
        """Add to the bytes unpacked.

        Raises:
            UserError: they are above the limit.
        """
        self.spent += count
        if self.spent > self.limit:
            raise UserError(
                f"{self.key}: unpacks to more than download.max_megabytes ({self.limit / 1e6:g}); "
                "raise it only if you trust the archive"
            )

    def select(self, name: str) -> str | None:
        """A member's name as a relative POSIX path; None if the member is not to be unpacked.

        Raises:
            UserError: the name is absolute or contains `..`, or there are too many members.
        """
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise UserError(f"{self.key}: the archive has more than {MAX_MEMBERS} members; give an unpacked folder")
        path = PurePosixPath(name.replace("\\", "/"))  # some Windows programs write backslashes
        parts = path.parts
        if parts and (parts[0].startswith("/") or ".." in parts or re.match(r"^[A-Za-z]:", parts[0])):
            raise UserError(f"{self.key}: unsafe archive: member {name!r} would be written outside its folder")
        if not parts or any(image_folder.is_hidden(part) for part in parts):
            return None
        image = image_folder.is_image(path.name)
        if parts[: len(self.prefix)] != self.prefix:
            if image:
                self.outside.add("/".join(parts[:-1]) or "its top folder")
            return None
        wanted = image or image_folder.is_mask(path.name) or path.suffix.lower() == ".txt"
        return path.as_posix() if wanted else None

    def refuse_special(self, name: str) -> None:
        if image_folder.is_image(name):
            self.refused.append(Refused(name, "a link or a device, not a file"))

    def elsewhere(self) -> str:
        shown = sorted(self.outside, key=image_folder.natural)
        more = ", ..." if len(shown) > 8 else ""
        return f"; folders with images: {', '.join(shown[:8])}{more}" if shown else ""


def _unpack_zip(archive: Path, unpacking: _Unpacking) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            name = unpacking.select(member.filename)
            if member.is_dir() or name is None:
                continue
            if member.flag_bits & 0x1:
                raise UserError(f"{unpacking.key}: the zip is encrypted ({name}); give one without a password")
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                unpacking.refuse_special(name)
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others whole
                raise UserError(f"{unpacking.key}: the zip compresses {name} by an unsupported method; use deflate")
            # zipfile writes at most this much, and its CRC check fails if the header claims too little.
            unpacking.spend(member.file_size)
            member.filename = name
            opened.extract(member, unpacking.into)
            unpacking.images += image_folder.is_image(name)


def _unpack_tar(archive: Path, kind: str, unpacking: _Unpacking) -> None:
    openers: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with openers.get(kind, lambda path: path.open("rb"))(archive) as stream:
        counted = _Counted(stream, unpacking)
        with tarfile.open(fileobj=counted, mode="r|") as opened:  # type: ignore[call-overload]
            for member in opened:
                name = unpacking.select(member.name)
                if member.isdir() or name is None:
                    continue
                # A sparse member would be written at the size that its header claims.
                if not member.isreg() or member.issparse():
                    unpacking.refuse_special(name)
                    continue
                # Not `extract`: its filter came with Python 3.11.4. The name is checked, and only bytes are written.
                target = unpacking.into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if (content := opened.extractfile(member)) is not None:
                    with content, target.open("wb") as file:
                        shutil.copyfileobj(content, file)
                unpacking.images += image_folder.is_image(name)


class _Counted:
    """The uncompressed stream of a tar archive; counts every byte, including headers and skipped members."""

    def __init__(self, stream: IO[bytes], unpacking: _Unpacking) -> None:
        self.stream = stream
        self.unpacking = unpacking

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.unpacking.limit - self.unpacking.spent + 1))
        self.unpacking.spend(len(data))
        return data
