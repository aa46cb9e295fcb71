"""Instance images: download-data gathers them from any source, later stages read them.

Sources are a folder, an archive, an https address and a Hugging Face data set. All are untrusted: archives are unpacked
under size limits (archive.py), downloads are restricted (http.py), and every image is decoded by `images.open_rgb`.
Images that are skipped are reported with the reason.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from PIL import Image
from tqdm import tqdm

from customdiff import files, images
from customdiff.config import Download, Source
from customdiff.errors import UserError
from customdiff.images import brief
from customdiff.redaction import redact
from customdiff.sources import archive, http, image_folder, masks
from customdiff.sources.image_folder import Refused, SourceImage


@contextmanager
def errors_name_the_source(folder: Path, prefix: str = "") -> Iterator[None]:
    """Within it, errors about caption files in a folder that `collect` wrote name the files of the source instead.

    Args:
        prefix: goes before these names, for example "concepts.cat.source: ".
    """
    try:
        yield
    except UserError as error:
        manifest, message = folder / "manifest.json", str(error)
        for entry in json.loads(manifest.read_text(encoding="utf-8"))["images"] if manifest.exists() else ():
            caption = Path(entry["source"]).with_suffix(".txt").as_posix()
            message = message.replace(str((folder / entry["file"]).with_suffix(".txt")), prefix + caption)
        raise UserError(message) from error


@dataclass
class Collected:
    """What `collect` wrote: manifest entries of the images kept, images skipped, and warnings."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    set_aside: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(
    concept: str,
    source: Source,
    limits: Download,
    out: Path | str,
    *,
    transport: httpx.BaseTransport | None = None,
) -> Collected:
    """Gather a concept's instance images in a folder, which is replaced as a whole or left as it was.

    Writes `000.png`, `001.png`, ... (RGB, in natural order of their source names, no side above
    `limits.max_side` px), `000.txt` for an image with a caption, `000.mask.png` for an image with transparent parts or
    a mask file, and `manifest.json`: file, source name, SHA-256 of the source bytes and stored size [width, height] of
    each image, and the images set aside with the reason.

    Args:
        concept: its name in params.yaml, for error messages.
        out: folder to write.
        transport: replaces the network in tests.

    Raises:
        UserError: the source cannot be reached or read, is unsafe, or has too few or too many good images.
    """
    key = f"concepts.{concept}.source"
    result = Collected()
    out = Path(out)
    with files.atomic_directory(out) as folder, files.work_directory(out) as work:
        found = _open_source(key, source, limits, work, result, transport)
        seen: dict[str, str] = {}
        for item in found:
            digest = hashlib.sha256(item.data).hexdigest()
            if digest in seen and not item.problem:
                result.set_aside.append(Refused(item.name, f"the same file as {seen[digest]}"))
                continue
            try:
                image = image_folder.decode(item, limits.max_megapixels)
            except images.ImageError as error:
                result.set_aside.append(Refused(item.name, error.reason))
                continue
            seen[digest] = item.name
            _keep(item, digest, images.limit_side(image, limits.max_side), folder, result)
            _keep_mask(item, limits, folder, result)
        _check_count(key, limits, result)
        manifest = {"images": result.kept, "set_aside": [vars(refused) for refused in result.set_aside]}
        (folder / "manifest.json").write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return result


def local_images(key: str, source: Source, limits: Download, work: Path) -> Iterable[SourceImage]:
    """The images of a source that is a folder or an archive on this machine, undecoded; none of any other source.

    Args:
        key: of params.yaml, for error messages.
        work: empty folder, where an archive is unpacked.

    Raises:
        UserError: the source cannot be read, or is unsafe.
    """
    return _open_source(key, source, limits, work, Collected(), None) if source.path else []


def instance_paths(folder: Path | str) -> list[Path]:
    """Paths of the instance images that `collect` wrote, in order.

    Raises:
        UserError: there are none.
    """
    folder = Path(folder)
    paths = sorted(
        path
        for path in folder.glob("*")
        if path.suffix.lower() in images.SUFFIXES and not image_folder.is_mask(path.name)
    )
    if not paths:
        raise UserError(f"{folder}: no instance images; run `dvc repro download-data@{folder.name}` first")
    return paths


def read_instance_images(folder: Path | str) -> list[Image.Image]:
    """The instance images that `collect` wrote, RGB, in order.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    # Their size was limited when they were downloaded.
    return [images.open_rgb(path, max_megapixels=float("inf")) for path in instance_paths(folder)]


def captioned_photos(folder: Path | str) -> list[bool]:
    """Whether each instance image that `collect` wrote has a caption file beside it, in order.

    Raises:
        UserError: there are no images.
    """
    return [path.with_suffix(".txt").is_file() for path in instance_paths(folder)]


def _keep(item: SourceImage, digest: str, image: Image.Image, folder: Path, result: Collected) -> None:
    stem = f"{len(result.kept):03}"
    image.save(folder / f"{stem}.png")
    entry = {"file": f"{stem}.png", "source": item.name, "sha256": digest, "size": list(image.size)}
    if item.caption:
        (folder / f"{stem}.txt").write_text(item.caption + "\n", encoding="utf-8")
        entry["caption"] = f"{stem}.txt"
    result.kept.append(entry)


def _keep_mask(item: SourceImage, limits: Download, folder: Path, result: Collected) -> None:
    """Store the subject mask of the image that was kept last, at the size that the image is stored at."""
    entry = result.kept[-1]
    try:
        found = masks.mask_of(item, tuple(entry["size"]), limits.max_megapixels)
    except images.ImageError as error:
        result.notes.append(f"{error}; the photo is kept without it")
        return
    if found:
        entry["mask"] = f"{entry['file'].removesuffix('.png')}{image_folder.MASK_SUFFIX}"
        entry["mask_from"] = found.origin
        found.image.save(folder / entry["mask"])


def _check_count(key: str, limits: Download, result: Collected) -> None:
    good = len(result.kept)
    if good >= limits.minimum:
        return
    aside = "; ".join(f"{refused.name}: {refused.reason}" for refused in result.set_aside[:5])
    more = f" and {len(result.set_aside) - 5} more" if len(result.set_aside) > 5 else ""
    raise UserError(
        f"{key}: {good} good image{'' if good == 1 else 's'}, but download.minimum is {limits.minimum}; "
        + (f"set aside: {aside}{more}; " if aside else "")
        + "add images or lower download.minimum"
    )


def _open_source(
    key: str,
    source: Source,
    limits: Download,
    work: Path,
    result: Collected,
    transport: httpx.BaseTransport | None,
) -> Iterable[SourceImage]:
    """The images of a source of any kind, undecoded, in natural order."""
    if source.hub:
        _refuse_sha256(key, source)
        return hub_images(key, source, limits)
    if source.url:
        archive_path = work / "download"
        download(source.url, archive_path, limits, key=f"{key}.url", transport=transport)
        return _from_archive(f"{key}.url", key, archive_path, source, limits, work, result)
    path = Path(source.path or "")
    if path.is_dir():
        _refuse_sha256(key, source)
        return _from_folder(key, path, source.subfolder, limits, result)
    if not path.is_file():
        raise UserError(f"{key}.path: {path} does not exist; give a folder of images, or a zip or tar archive")
    return _from_archive(f"{key}.path", key, path, source, limits, work, result)


def _refuse_sha256(key: str, source: Source) -> None:
    if source.sha256:
        raise UserError(f"{key}.sha256: only applies to an archive; remove it for a folder or a data set")


def _from_archive(
    named: str, key: str, archive_path: Path, source: Source, limits: Download, work: Path, result: Collected
) -> Iterator[SourceImage]:
    if source.sha256:
        digest = files.sha256(archive_path)
        if digest != source.sha256.lower():
            raise UserError(
                f"{key}.sha256: params.yaml has {source.sha256.lower()}, the archive {digest}; "
                "if you trust the changed archive, correct the key"
            )
    unpacked = work / "unpacked"
    result.set_aside += archive.unpack(
        archive_path, unpacked, limits.max_megabytes, key=named, subfolder=source.subfolder
    )
    return _from_folder(key, unpacked, source.subfolder, limits, result)


def _from_folder(
    key: str, root: Path, subfolder: str | None, limits: Download, result: Collected
) -> Iterator[SourceImage]:
    folder = root / subfolder if subfolder else root
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{key}.subfolder: {subfolder} is a link out of the source; name a folder inside it")
    names = [name for name in image_folder.walk(folder) if image_folder.is_image(name)]
    if not names:
        raise UserError(f"{key}: no images in {subfolder or root}; {_folders_with_images(root)}")
    if len(names) > limits.maximum:
        raise UserError(
            f"{key}: {len(names)} images, but download.maximum is {limits.maximum}; "
            f"set {key}.subfolder to one folder ({_folders_with_images(root)}), or raise download.maximum"
        )
    parents = {str(PurePosixPath(name).parent) for name in names}
    if len(parents) > 1:
        result.notes.append(
            f"{key}: the images come from {len(parents)} folders; if they show several subjects, "
            f"set {key}.subfolder to one of them ({_folders_with_images(folder)})"
        )
    return image_folder.folder_images(folder, names, limits.max_megabytes)


def _folders_with_images(root: Path) -> str:
    found = {str(PurePosixPath(name).parent) for name in image_folder.walk(root) if image_folder.is_image(name)}
    if not found:
        return "it contains no images"
    parents = ["its top folder" if parent == "." else parent for parent in sorted(found, key=image_folder.natural)]
    return f"folders with images: {', '.join(parents[:8])}{', ...' if len(parents) > 8 else ''}"


def download(url: str, path: Path, limits: Download, *, key: str, transport: httpx.BaseTransport | None = None) -> None:
    """Download an https address to a file, with a progress bar.

    The host of the address, which the user chose, may be in a private network; redirects to other private hosts are
    refused.

    Raises:
        UserError: the download failed; names `key`.
    """
    host, _ = http.origin_of(url)
    bar = tqdm(unit="B", unit_scale=True, desc=f"download {host}", leave=False, disable=None)

    def show(count: int, total: int | None) -> None:
        bar.total = total
        bar.update(count)

    try:
        with bar, http.client(limits.timeout, transport) as client, path.open("wb") as file:
            http.fetch(
                client,
                url,
                file,
                max_bytes=limits.max_megabytes * 1e6,
                trusted=frozenset({http.origin_of(url)}),
                deadline=limits.deadline,
                on_chunk=show,
            )
    except http.FetchError as error:
        too_large = isinstance(error, http.TooLargeError)
        fix = "raise download.max_megabytes" if too_large else "check the address and the network"
        raise UserError(
            f"{key}: {redact(url)}: {error}; {fix}, or download the archive yourself and set path"
        ) from error


def hub_images(key: str, source: Source, limits: Download) -> Iterator[SourceImage]:
    """Stream the first image column of a Hub data set, undecoded, with its `text` or `caption` column if any.

    `source.hub` may also be a local folder that `datasets` can read. Only image bytes inside the data set
    itself are read: a row that refers to another place is skipped.

    Raises:
        UserError: the data set, split or an image column cannot be found, or there are too many images.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{key}.hub: needs the package datasets; pip install 'customdiff[pipeline]'") from error
    datasets.utils.logging.set_verbosity_error()
    name = source.hub or ""
    with _data_set_errors(key, name):
        rows = datasets.load_dataset(
            name, data_dir=source.subfolder, split=source.split, revision=source.revision, streaming=True
        )
    columns = rows.features or {}
    pictures = [column for column, feature in columns.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise UserError(f"{key}.hub: {name} has no image column; its columns: {', '.join(columns) or 'unknown'}")
    caption = next((column for column in ("text", "caption") if column in columns), None)
    undecoded = rows.cast_column(pictures[0], datasets.Image(decode=False))
    end = time.monotonic() + limits.deadline
    for number, row in enumerate(_rows(key, name, undecoded)):
        if time.monotonic() > end:
            raise UserError(
                f"{key}.hub: {name} was not read within download.deadline ({limits.deadline:g} s); raise it"
            )
        if number >= limits.maximum:
            raise UserError(
                f"{key}.hub: {name} has more than {limits.maximum} images (download.maximum) in split "
                f"{source.split}; choose a smaller split or subfolder, or raise download.maximum"
            )
        with _data_set_errors(key, name):
            image = _hub_image(row[pictures[0]] or {}, row[caption] if caption else None, name, limits, number)
        yield image


def _rows(key: str, name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    with _data_set_errors(key, name):  # of the iteration alone: what the consumer raises does not pass through here
        yield from rows


@contextmanager
def _data_set_errors(key: str, name: str) -> Iterator[None]:
    """Convert what `datasets` and its file systems raise for missing or unreadable data to a `UserError`."""
    import pyarrow
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (DatasetsError, OSError, ValueError, HTTPError, httpx.HTTPError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{key}.hub: {name} cannot be read ({type(error).__name__}: {brief(error)}); check the name, the "
            "split, the revision and the network, or log in with `hf auth login` if it is private"
        ) from error


def _hub_image(cell: dict[str, Any], caption: Any, name: str, limits: Download, number: int) -> SourceImage:
    """One undecoded cell of an image column; bytes outside the data set `name` are not read."""
    path = cell.get("path") or ""
    label = path.rpartition("/")[2] or f"row {number}"
    text = image_folder.one_line(caption) if isinstance(caption, str) else None
    if cell.get("bytes"):
        return SourceImage(label, cell["bytes"], text)
    home = Path(name).resolve()
    if home.is_dir():
        local = Path(path.removeprefix("file://")).resolve()
        opened: Any = local.open("rb") if local.is_relative_to(home) and local.is_file() else None
    elif path.rpartition("::")[2].startswith((f"hf://datasets/{name}@", f"hf://datasets/{name}/")):
        import fsspec

        opened = fsspec.open(path, "rb").open()
    else:
        opened = None
    if opened is None:
        return SourceImage(label, b"", problem="is outside the data set")
    with opened as file:
        return SourceImage(label, file.read(int(limits.max_megabytes * 1e6)), text)
