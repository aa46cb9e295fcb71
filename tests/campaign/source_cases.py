"""Hostile photos, folders, archives and file names for download-data."""

import io
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from customdiff.config import Download, Source
from customdiff.sources import instance_images

from .case import Case

Build = Callable[[], None]


def cases() -> Iterator[Case]:
    """All cases of instance images."""
    for name, build, expected in FOLDERS:
        yield Case("photos", name, collects(build, path="photos"), expected)
    for name, data, expected in ARCHIVES:
        yield Case("archives", name, collects(writes(data), path="photos.zip"), expected)
    for name, build, options, expected in OPTIONS:
        yield Case("photos", name, collects(build, **options), expected)


def collects(build: Build, **source: str) -> Callable[[], None]:
    """Build a source in the working folder and collect its images, of which two are needed."""

    def act() -> None:
        build()
        limits = Download(minimum=2, max_megabytes=2, maximum=20)
        result = instance_images.collect("cat", Source(**source), limits, "out")
        print([refused.reason for refused in result.set_aside], [entry["source"] for entry in result.kept])
        left = [path.name for path in Path().iterdir() if path.name.startswith(".")]
        assert not left, left

    return act


def good(folder: str = "photos", *names: str) -> None:
    """Two photos."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names or ("a.png", "b.png")):
        Image.new("RGB", (40, 30), (number * 40, 90, 9)).save(Path(folder, name))


def with_file(name: str | bytes, data: bytes) -> Build:
    """Two photos and a file."""

    def build() -> None:
        good()
        path = os.path.join(b"photos", name if isinstance(name, bytes) else name.encode())
        with open(path, "wb") as file:
            file.write(data)

    return build


def with_call(call: Callable[[], object]) -> Build:
    """Two photos and what `call` does."""

    def build() -> None:
        good()
        call()

    return build


def png(width: int, height: int) -> bytes:
    """A PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, 5, 5)).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no pixels."""
    data = bytearray(png(1, 1))
    data[16:24] = width.to_bytes(4) + height.to_bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


ASIDE = ""
FOLDERS: list[tuple[str, Build, str]] = [
    ("a FIFO", with_call(lambda: os.mkfifo("photos/c.png")), ASIDE),
    ("a link to /dev/zero", with_call(lambda: os.symlink("/dev/zero", "photos/c.png")), ASIDE),
    ("a link to /dev/tty", with_call(lambda: os.symlink("/dev/tty", "photos/c.png")), ASIDE),
    ("a link to itself", with_call(lambda: os.symlink("c.png", "photos/c.png")), ASIDE),
    ("a link to nothing", with_call(lambda: os.symlink("nowhere", "photos/c.png")), ASIDE),
    ("a folder with an image's name", with_call(lambda: os.mkdir("photos/c.png")), ASIDE),
    ("a link to the folder itself", with_call(lambda: os.symlink("../photos", "photos/c")), ASIDE),
    ("a FIFO as caption", with_call(lambda: os.mkfifo("photos/a.txt")), ASIDE),
    ("a FIFO as mask", with_call(lambda: os.mkfifo("photos/a.mask.png")), ASIDE),
    ("a device as caption", with_call(lambda: os.symlink("/dev/zero", "photos/a.txt")), ASIDE),
    ("a caption of bytes", with_file("a.txt", bytes(range(256))), ASIDE),
    ("a caption of megabytes", with_file("a.txt", b"cat " * 10**6), ASIDE),
    ("a mask of other proportions", with_file("a.mask.png", png(10, 300)), ASIDE),
    ("a broken mask", with_file("a.mask.png", b"\x89PNG"), ASIDE),
    ("a mask of one pixel", with_file("a.mask.png", png(1, 1)), ASIDE),
    ("30000 x 1", with_file("c.png", png(30000, 1)), ASIDE),
    ("1 x 30000", with_file("c.png", png(1, 30000)), ASIDE),
    ("1 x 1", with_file("c.png", png(1, 1)), ASIDE),
    ("a claim of 60000 x 60000", with_file("c.png", png_header(60000, 60000)), ASIDE),
    ("a claim of 4 billion squared", with_file("c.png", png_header(2**31 - 1, 2**31 - 1)), ASIDE),
    ("a claim of 0 x 0", with_file("c.png", png_header(0, 0)), ASIDE),
    ("a truncated PNG", with_file("c.png", png(90, 90)[:-20]), ASIDE),
    ("an empty file", with_file("c.png", b""), ASIDE),
    ("a web page", with_file("c.jpg", b"<html>"), ASIDE),
    ("a HEIC photo", with_file("c.heic", b"\0\0\0\x18ftypheic"), ASIDE),
    ("an SVG", with_file("c.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ASIDE),
    ("an EPS that runs code", with_file("c.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ASIDE),
    ("random bytes", with_file("c.gif", b"GIF89a" + bytes(range(200))), ASIDE),
    ("a TIFF of nothing", with_file("c.tif", b"II*\0\x08\0\0\0\xff\xff"), ASIDE),
    ("a name that is not UTF-8", with_file(b"c\xff\xfe.png", png(20, 20)), ASIDE),
    ("a refused name that is not UTF-8", with_file(b"c\xff\xfe.png", b""), ASIDE),
    ("a name with a line break", with_file("c\nd.png", png(20, 21)), ASIDE),
    ("a name with a terminal code", with_file("c\x1b[2J.png", b""), ASIDE),
    ("a name of digits", with_file(f"{'9' * 240}.png", png(20, 22)), ASIDE),
    ("a name of shell text", with_file("$(touch PWNED);.png", png(20, 23)), ASIDE),
    ("a file above the limit", with_file("c.png", b"x" * 3_000_000), ASIDE),
    ("the same file twice", with_file("c.png", png(40, 30)), ASIDE),
    ("no images", lambda: os.mkdir("photos"), "concepts.cat.source: no images in photos"),
    ("one image", lambda: good("photos", "a.png"), "concepts.cat.source: 1 good image"),
    ("30 images", lambda: good("photos", *(f"{i}.png" for i in range(30))), "download.maximum"),
    ("nothing", lambda: None, "concepts.cat.source.path: photos does not exist"),
    ("a FIFO in place of the folder", lambda: os.mkfifo("photos"), "concepts.cat.source.path"),
    ("a device in place of the folder", lambda: os.symlink("/dev/zero", "photos"), "concepts.cat.source.path"),
    ("a photo in place of the folder", lambda: Path("photos").write_bytes(png(9, 9)), "neither a zip nor a tar"),
    ("an output that is a link", with_call(lambda: os.symlink("/tmp", "out")), "out: is a link"),
    ("an output that is a file", with_call(lambda: Path("out").write_text("")), "out: is a file"),
    ("an output in a file", with_call(lambda: (Path("x").touch(), os.symlink("x/out", "out"))), "out: is a link"),
]
OPTIONS: list[tuple[str, Build, dict[str, str], str]] = [
    ("a link out as subfolder", with_call(lambda: os.symlink("/usr", "photos/s")), {"path": "photos", "subfolder": "s"}, "subfolder"),
    ("a missing subfolder", good, {"path": "photos", "subfolder": "s"}, "no images in s"),
    ("a checksum of a folder", good, {"path": "photos", "sha256": "0" * 64}, "sha256"),
    ("a wrong checksum", lambda: writes(zipped(("a.png", png(9, 9))))(), {"path": "photos.zip", "sha256": "0" * 64}, "sha256"),
    ("a path of 5000 characters", good, {"path": "x" * 5000}, "name too long"),
    ("an unreachable host", good, {"url": "https://127.0.0.1:9/x.zip"}, "concepts.cat.source.url: https://127.0.0.1:9/x.zip: cannot be reached"),
    ("a host that does not exist", good, {"url": "https://nowhere.invalid/x.zip"}, "concepts.cat.source.url"),
    ("a password in the address", good, {"url": "https://bob:S3cr@t@127.0.0.1:9/x.zip?token=S3cr"}, r"url: https://127.0.0.1:9/x.zip\?\*\*\*: cannot"),
]  # fmt: skip


def writes(data: bytes) -> Build:
    """Write an archive."""

    def build() -> None:
        Path("photos.zip").write_bytes(data)

    return build


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of two photos and these members."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in (("a.png", png(40, 30)), ("b.png", png(41, 30)), *members):
            archive.writestr(name, data)
    return buffer.getvalue()


def special(name: str, mode: int) -> zipfile.ZipInfo:
    """A zip member of a mode."""
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.create_system = 3
    return info


def tarred(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    """A tar of two photos and these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for member, data in (
            (tarfile.TarInfo("a.png"), png(40, 30)),
            (tarfile.TarInfo("b.png"), png(41, 30)),
            *members,
        ):
            member.size = member.size or len(data)
            archive.addfile(member, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    """A tar member of a kind."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def encrypted(data: bytes) -> bytes:
    """A zip whose members claim to be encrypted."""
    changed = bytearray(data)
    for place in range(len(changed) - 4):
        if changed[place : place + 4] == b"PK\x03\x04":
            changed[place + 6] |= 1
        if changed[place : place + 4] == b"PK\x01\x02":
            changed[place + 8] |= 1
    return bytes(changed)


UNSAFE = "unsafe archive"
ARCHIVES: list[tuple[str, bytes, str]] = [
    *(
        (f"{kind} with {name!r:.40}", data, UNSAFE)
        for name in ("../c.png", "/tmp/c.png", "a/../../c.png", "C:\\c.png", "..\\c.png", "//h/c.png", "./../c.png")
        for kind, data in (("zip", zipped((name, png(9, 9)))), ("tar", tarred((member(name), png(9, 9)))))
    ),
    ("a link in a zip", zipped((special("c.png", stat.S_IFLNK | 0o777), b"/etc/passwd")), ASIDE),
    ("a device in a zip", zipped((special("c.png", stat.S_IFCHR | 0o666), b"")), ASIDE),
    ("a link in a tar", tarred((member("c.png", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")), ASIDE),
    ("a link to a folder, then through it", tarred((member("d", tarfile.SYMTYPE, linkname="/tmp"), b""), (member("d/c.png"), png(9, 9))), ASIDE),
    ("a hard link in a tar", tarred((member("c.png", tarfile.LNKTYPE, linkname="../out"), b"")), ASIDE),
    ("a FIFO in a tar", tarred((member("c.png", tarfile.FIFOTYPE), b"")), ASIDE),
    ("a device in a tar", tarred((member("c.png", tarfile.CHRTYPE, devmajor=1, devminor=5), b"")), ASIDE),
    ("a member above its size", member("c.png", size=10**9).tobuf() + png(9, 9), "damaged|unpacks to more"),
    ("a bomb in a zip", zipped(("c.png", bytes(5_000_000))), "download.max_megabytes"),
    ("a bomb in a tar.gz", tarred((member("c.png"), bytes(5_000_000)), mode="w:gz"), "download.max_megabytes"),
    ("a bomb in a tar.xz", tarred((member("c.bin"), bytes(5_000_000)), mode="w:xz"), "download.max_megabytes"),
    ("a bomb in a tar.bz2", tarred((member("c.bin"), bytes(5_000_000)), mode="w:bz2"), "download.max_megabytes"),
    ("an encrypted zip", encrypted(zipped()), "encrypted"),
    ("half a zip", zipped()[:200], "damaged or incomplete"),
    ("half a tar", tarred()[:700], "damaged|no images|good image"),
    ("half a tar.gz", tarred(mode="w:gz")[:100], "damaged"),
    ("a zip of wrong checksums", zipped(compression=0).replace(b"IDAT", b"IDAX"), "damaged"),
    ("a zip of an unknown method", zipped(compression=0).replace(b"PK\x03\x04\x14\0\0\0\0\0", b"PK\x03\x04\x14\0\0\0\x63\0").replace(b"PK\x01\x02\x14\x03\x14\0\0\0\0\0", b"PK\x01\x02\x14\x03\x14\0\0\0\x63\0"), "unsupported|damaged"),
    ("an empty zip", b"PK\x05\x06" + bytes(18), "no images"),
    ("an empty tar", bytes(10240), "concepts.cat.source.path"),
    ("an empty file", b"", "the file is empty"),
    ("a web page", b"<html>", "web page"),
    ("a RAR", b"Rar!\x1a\x07\x00" + bytes(100), "neither a zip nor a tar"),
    ("a gzip of text", zlib.compress(b"text", wbits=31), "damaged|no images"),
    ("a name of 5000 characters", tarred((member("x" * 5000 + ".png"), png(9, 9))), "damaged or cannot be unpacked"),
    ("a folder of 5000 digits", tarred((member("9" * 5000 + "/c.txt"), b"x")), "damaged or cannot be unpacked"),
    ("a name that is not UTF-8", tarred((member("c\udcff.png"), png(20, 20))), ASIDE),
    ("a name with a NUL", zipped(("c.png\0.exe", png(20, 20))), ASIDE),
    ("a name with a line break", zipped(("c\nd.png", png(20, 20))), ASIDE),
    ("the same name twice", zipped(("a.png", png(20, 20))), ASIDE),
    ("a file where a folder is needed", zipped(("a.png/c.png", png(20, 20))), "damaged or cannot be unpacked"),
    ("a hidden folder", zipped((".git/hooks/post-checkout", b"touch PWNED")), ASIDE),
    ("a script", zipped(("setup.py", b"import os")), ASIDE),
    ("a pickle", zipped(("c.pt", b"cos\nsystem\n(S'touch PWNED'\ntR.")), ASIDE),
    ("a zip in a zip", zipped(("c.zip", zipped())), ASIDE),
    ("more images than the maximum", zipped(*((f"{i}.png", png(9, i + 9)) for i in range(40))), "download.maximum"),
]  # fmt: skip
