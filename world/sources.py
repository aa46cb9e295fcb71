"""Fetch the pictures that the world is made of, by package name, and record what they are.

Each package comes through its own client (npm, apt), is checked against the sha256 below and unpacked into the work
folder. Nothing fetched here enters the repository: the exported scenes and weights do.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package: how it is asked for, how its file is named, what it must hash to, what may be done with it."""

    name: str
    folder: str
    fetch: tuple[str, ...]
    pattern: str
    sha256: str
    licence: str
    credit: str


SOURCES = (
    Source(
        "@lobehub/fluent-emoji-3d 1.1.0 (npm)",
        "fluent",
        ("npm", "pack", "@lobehub/fluent-emoji-3d@1.1.0"),
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji, copyright Microsoft Corporation; packaged by LobeHub",
    ),
    Source(
        "fonts-noto-color-emoji 2.042-0+deb12u1 (Debian)",
        "noto",
        ("apt-get", "download", "fonts-noto-color-emoji=2.042-0+deb12u1"),
        "fonts-noto-color-emoji_*.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        "OFL-1.1",
        "Noto Color Emoji, copyright Google Inc.",
    ),
    Source(
        "openclipart-png 1:0.18+dfsg-19 (Debian)",
        "clipart",
        ("apt-get", "download", "openclipart-png=1:0.18+dfsg-19"),
        "openclipart-png_*.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "public domain (Creative Commons Public Domain Dedication)",
        "Open Clip Art Library and its artists",
    ),
)


def sha256(path: Path) -> str:
    """The file's sha256 as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: Source, folder: Path) -> Path:
    """The package's file in `folder`, asked for where it is missing, refused where it is another one."""
    if not list(folder.glob(source.pattern)):
        subprocess.run(source.fetch, cwd=folder, check=True)
    (path,) = folder.glob(source.pattern)
    if (found := sha256(path)) != source.sha256:
        raise ValueError(f"{path.name}: sha256 is {found}, expected {source.sha256}; delete the file and fetch again")
    return path


def unpack(package: Path, folder: Path) -> None:
    """Unpack an npm tarball or a Debian package."""
    folder.mkdir(exist_ok=True)
    if package.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    else:
        with tarfile.open(package) as tar:
            tar.extractall(folder, filter="data")


def main() -> None:
    """Fetch and unpack every source; write sources.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    folder = parser.parse_args().work / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        unpack(fetch(source, folder), folder / source.folder)
    (folder / "sources.json").write_text(json.dumps([asdict(s) for s in SOURCES], indent=1) + "\n")


if __name__ == "__main__":
    main()
