"""Photos of a new concept: found in files, folders and archives, copied with their captions and masks, and checked."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from customdiff.config import Download, Source
from customdiff.errors import UserError, printable
from customdiff.sources import archive, image_folder
from customdiff.sources.image_folder import MASK_SUFFIX
from customdiff.sources.instance_images import Collected, collect

CAPTION_SUFFIXES = (".txt", ".TXT")


def gather(sources: Sequence[Path], into: Path, work: Path, limits: Download) -> None:
    """Copy the photos in files, folders and archives into one new folder, each with its caption and mask.

    Photos keep their names; where two folders have the same, the later one gets a number. The originals are only read.

    Args:
        work: folder for the contents of archives.

    Raises:
        UserError: a path does not exist, contains no photo or cannot be read, or there are too many photos.
    """
    found = [path for number, source in enumerate(sources) for path in _photos(source, work / str(number), limits)]
    found = list({path.resolve(): path for path in found}.values())
    if not found:
        raise UserError("PHOTOS: no photos, only captions or masks; name the photos themselves")
    if len(found) > limits.maximum:
        raise UserError(
            f"PHOTOS: {len(found)} photos, but download.maximum is {limits.maximum}; 4 to 5 of the subject suffice"
        )
    into.mkdir(parents=True)
    owners: dict[str, tuple[Path, str]] = {}  # name in the copy -> folder and name of the original, without suffixes
    for path in found:
        stem, number, owner = path.stem, 1, (path.parent, path.stem.lower())
        while owners.setdefault(stem.lower(), owner) != owner:
            number += 1
            stem = f"{path.stem}-{number}"
        _copy(path, into, stem, limits)


def check(name: str, source: Source, limits: Download, out: Path) -> Collected:
    """Read the photos as the stage download-data does, and store them in `out` as it does.

    Raises:
        UserError: there are too few or too many good photos.
    """
    return collect(name, source, limits, out)


def remove_set_aside(folder: Path, checked: Collected) -> None:
    """Remove the photos that were set aside from a copy, and captions and masks that then belong to no photo."""
    refused = {each.name for each in checked.set_aside}
    names = {entry["source"] for entry in checked.kept}
    owners = names | {Path(name).stem for name in names}
    for path in list(folder.iterdir()):
        name = printable(path.name)  # as the manifest has it
        owner = name.removesuffix(MASK_SUFFIX) if image_folder.is_mask(name) else Path(name).stem
        if name in refused or (name not in names and owner not in owners):
            path.unlink()


def is_photo(path: Path) -> bool:
    """Whether a file's name is that of a photo."""
    return image_folder.is_image(path.name)


def _photos(source: Path, work: Path, limits: Download) -> Iterator[Path]:
    """The photos that one argument names."""
    if source.is_dir():
        yield from _in_folder(source, str(source))
    elif not source.is_file():
        raise UserError(f"PHOTOS: {source} does not exist; name photos, a folder of photos, or a zip or tar archive")
    elif image_folder.is_image(source.name):
        yield source
    elif image_folder.is_mask(source.name) or source.suffix in CAPTION_SUFFIXES:
        return  # copied with its photo
    elif archive.archive_kind(source):
        archive.unpack(source, work, limits.max_megabytes, key=f"PHOTOS: {source}")
        yield from _in_folder(work, str(source))
    else:
        raise UserError(f"PHOTOS: {source} is not a photo, a folder or an archive; leave it out")


def _in_folder(folder: Path, name: str) -> list[Path]:
    found = [folder / each for each in image_folder.walk(folder) if image_folder.is_image(each)]
    if not found:
        raise UserError(f"PHOTOS: {name} contains no photos")
    return found


def _copy(photo: Path, into: Path, stem: str, limits: Download) -> None:
    """Copy a photo to `into/<stem><suffix>`, and the caption and masks beside it."""
    targets = {photo: stem + photo.suffix}
    targets |= {photo.with_suffix(suffix): stem + suffix.lower() for suffix in CAPTION_SUFFIXES}
    targets[photo.with_name(photo.name + MASK_SUFFIX)] = stem + photo.suffix + MASK_SUFFIX
    targets[photo.with_name(photo.stem + MASK_SUFFIX)] = stem + MASK_SUFFIX
    for path, name in targets.items():
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > limits.max_megabytes * 1e6:
                raise UserError(f"PHOTOS: {path} is above download.max_megabytes ({limits.max_megabytes:g})")
            shutil.copyfile(path, into / name)
        except OSError as error:
            raise UserError(f"PHOTOS: {path} cannot be read ({error.strerror or error})") from error
