"""Photos that were dropped on the page, in a temporary folder until they are added to the project."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from customdiff import images
from customdiff.config import Download
from customdiff.errors import UserError
from customdiff.sources import image_folder

MAX_PHOTO_MEGABYTES = 64


class DroppedPhotos:
    """A temporary folder of photos, and of captions (.txt) beside them."""

    def __init__(self) -> None:
        self._work = TemporaryDirectory(prefix="customdiff-")
        self._rounds = 0
        self._lock = threading.Lock()
        self.folder = Path(self._work.name, "photos")
        self.folder.mkdir()
        self.clean_up: Callable[[], None] = self._work.cleanup

    @property
    def names(self) -> list[str]:
        """The photos, in natural order."""
        return [name for name in image_folder.walk(self.folder) if image_folder.is_image(name)]

    def add(self, name: str, data: bytes, limits: Download) -> str:
        """Check a file and keep it; returns the name that it got: words, digits, dots and hyphens of its own.

        A photo whose name another one has gets a number; the same photo stays once.

        Raises:
            UserError: it is too large, is no photo whatever its name says, or there are `download.maximum` already.
        """
        safe = re.sub(r"[^\w.-]+", "-", image_folder.one_line(name) or "").encode()[-100:].decode(errors="ignore")
        safe = safe.lstrip(".-") or "photo"
        if len(data) > MAX_PHOTO_MEGABYTES * 1e6:
            raise UserError(f"{safe}: {len(data) / 1e6:.0f} MB, above {MAX_PHOTO_MEGABYTES} MB; scale the photo down")
        if safe.lower().endswith(".txt"):
            caption, path = f"{image_folder.one_line(data) or ''}\n", self.folder / safe
            with self._lock:
                if path.exists() and path.read_text(encoding="utf-8") != caption:
                    raise UserError(f"{safe}: left out: there is another of this name; rename it and its photo")
                path.write_text(caption, encoding="utf-8")
            return safe
        if not image_folder.is_image(safe):
            raise UserError(f"{safe}: not a photo by its name; drop files such as {', '.join(images.SUFFIXES[:4])}")
        images.open_rgb(data, limits.max_megapixels, name=safe)
        with self._lock:  # browsers send several at once
            path, number = self.folder / safe, 1
            while path.exists() and path.read_bytes() != data:
                number += 1
                path = self.folder / f"{Path(safe).stem}-{number}{Path(safe).suffix}"
            if not path.exists() and len(self.names) >= limits.maximum:
                raise UserError(
                    f"{safe}: left out: download.maximum is {limits.maximum}; 4 to 5 photos of the subject suffice"
                )
            path.write_bytes(data)
        return path.name

    def thumbnail(self, name: str) -> Image.Image:
        """A photo, scaled down."""
        return images.limit_side(images.open_rgb(self.folder / name), 192)

    def remove(self, name: str) -> None:
        """Leave a photo and its caption out."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).with_suffix(".txt").unlink(missing_ok=True)

    def clear(self) -> None:
        """Leave all photos out."""
        for name in self.names:
            self.remove(name)

    def work(self) -> Path:
        """A new empty folder beside the photos, for the checks."""
        self._rounds += 1
        folder = Path(self._work.name, str(self._rounds))
        folder.mkdir()
        return folder
