"""What lies beside a concept's photos: their captions and masks, and the folder of photos that were set aside."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from customdiff.config import Concept, Params
from customdiff.errors import UserError
from customdiff.files import atomic_file
from customdiff.sources import image_folder, instance_images
from customdiff.sources.image_folder import MASK_SUFFIX

if TYPE_CHECKING:
    from customdiff.preparation.captions import Caption
    from customdiff.preparation.examples import Example

SET_ASIDE = ".set-aside"  # the stages ignore hidden folders


class ShownPhoto(NamedTuple):
    """A photo as the stage prepare will use it.

    Attributes:
        name: in its source.
        image: RGB, as download-data stores it.
        example: its caption and mask.
    """

    name: str
    image: Image.Image
    example: "Example"


def captions_of(params: Params, name: str, *, ignore_sidecars: bool = False) -> "dict[str, Caption]":
    """The caption of each of a concept's photos, by the photo's name in its source.

    Args:
        ignore_sidecars: caption the photos that have a .txt file as well.

    Raises:
        UserError: the source cannot be read, a caption file is wrong, or the captioner cannot be loaded.
    """
    from customdiff.models import base
    from customdiff.preparation.captions import instance_captions

    concept = params.concepts[name]
    with tempfile.TemporaryDirectory(prefix="customdiff-") as work:
        folder = Path(work, name)
        collected = instance_images.collect(name, concept.source, params.download, folder)
        paths = [folder / entry["file"] for entry in collected.kept]
        if ignore_sidecars:
            for path in paths:
                path.with_suffix(".txt").unlink(missing_ok=True)
        device, tokenizer = base.device(params.base.device), base.load_tokenizer(params.base)
        with instance_images.errors_name_the_source(folder):
            found = instance_captions(paths, concept, params.prepare, device, tokenizer)
        return {entry["source"]: caption for entry, caption in zip(collected.kept, found, strict=True)}


def shown_photos(params: Params, name: str) -> list[ShownPhoto]:
    """A concept's photos with captions and masks, those without other backgrounds included.

    Raises:
        UserError: the source cannot be read, a caption is wrong, or the captioner or segmenter cannot be loaded.
    """
    from customdiff.models import base
    from customdiff.preparation.examples import instance_examples

    concept = params.concepts[name]
    with tempfile.TemporaryDirectory(prefix="customdiff-") as work:
        folder = Path(work, name)
        collected = instance_images.collect(name, concept.source, params.download, folder)
        with instance_images.errors_name_the_source(folder):
            found = instance_examples(
                folder,
                concept,
                params.prepare,
                base.device(params.base.device),
                tokenizer=base.load_tokenizer(params.base),
                all_masks=True,
            )
        images = instance_images.read_instance_images(folder)
        names = [entry["source"] for entry in collected.kept]
        return [ShownPhoto(*each) for each in zip(names, images, found, strict=True)]


def source_folder(name: str, concept: Concept) -> Path:
    """The folder of a concept's photos, which captions and masks are written to.

    Raises:
        UserError: the source is no folder.
    """
    source = concept.source
    if not source.path or not Path(source.path).is_dir():
        raise UserError(f"concepts.{name}.source: must be a folder of photos to write captions beside them")
    return Path(source.path, source.subfolder or "")


def write_caption(photo: Path, text: str, concept: Concept) -> Path:
    """Write the caption of a photo to the .txt file beside it, with {} for the modifier token; returns its path.

    Raises:
        UserError: the caption is empty, lacks {} and the token, or names another token.
    """
    from customdiff.preparation.captions import sidecar_caption

    text = (image_folder.one_line(text) or "").replace(concept.modifier_token, "{}")
    sidecar = photo.with_suffix(".txt")
    with tempfile.TemporaryDirectory(prefix="customdiff-") as work:  # the check of the stage, under the same name
        Path(work, sidecar.name).write_text(text, encoding="utf-8")
        try:
            sidecar_caption(Path(work, photo.name), concept)
        except UserError as error:
            raise UserError(str(error).replace(f"{work}/", "")) from error
    with atomic_file(sidecar) as incoming:
        incoming.write_text(text + "\n", encoding="utf-8")
    return sidecar


def write_mask(photo: Path, mask: Image.Image) -> Path:
    """Write the mask (mode L, white on the subject) of a photo to the .mask.png file beside it; returns its path."""
    path = photo.with_name(photo.name + MASK_SUFFIX)
    with atomic_file(path) as incoming:
        mask.save(incoming, "PNG")
    return path


def set_aside(photo: Path) -> Path:
    """Move a photo with its caption and masks to the hidden folder beside it; returns the photo's new path.

    Raises:
        UserError: the folder has a file of one of their names.
    """
    return _move(photo, photo.parent / SET_ASIDE)


def bring_back(photo: Path) -> Path:
    """Move a photo that was set aside back, with its caption and masks; returns its path.

    Raises:
        UserError: a file of one of their names exists there.
    """
    return _move(photo, photo.parent.parent)


def photos_aside(folder: Path) -> list[Path]:
    """The photos of a source that were set aside, in natural order."""
    found = [path for path in folder.rglob(f"{SET_ASIDE}/*") if image_folder.is_image(path.name)]
    return sorted(found, key=lambda path: image_folder.natural(path.name))


def _move(photo: Path, folder: Path) -> Path:
    moving = _with_companions(photo)
    for path in moving:
        if (folder / path.name).exists():
            raise UserError(f"{folder / path.name}: exists already; rename it or {path}")
    folder.mkdir(exist_ok=True)
    for path in moving:
        path.replace(folder / path.name)
    return folder / photo.name


def _with_companions(photo: Path) -> list[Path]:
    """A photo, and the caption and masks beside it that exist and belong to no other photo."""
    names = [photo.name, photo.name + MASK_SUFFIX]
    alike = (path for path in photo.parent.iterdir() if path.stem == photo.stem and path != photo)
    if not any(image_folder.is_image(path.name) for path in alike):
        names += [f"{photo.stem}.txt", f"{photo.stem}.TXT", photo.stem + MASK_SUFFIX]
    return [path for name in names if (path := photo.with_name(name)).is_file()]
