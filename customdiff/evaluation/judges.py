"""The models that score images: CLIP, a self-supervised vision model, and CLIP on cut-out subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import ndimage

from customdiff.config import Params
from customdiff.evaluation.metrics import image_alignment
from customdiff.models import base
from customdiff.models.clip import Clip
from customdiff.models.vision import VisionEncoder
from customdiff.preparation.masks import SMALLEST, problem_of
from customdiff.preparation.segmenter import Segmenter

# Mean grey is near zero after a judge's normalization of pixels, so the background adds least to a feature.
GREY = (128, 128, 128)
PART_MARGIN = 0.15  # around a part, as a share of its longer side


def on_grey(image: Image.Image, coverage: np.ndarray) -> Image.Image | None:
    """An image's subject on a plain background, so that a background that is copied from a photo earns nothing.

    Args:
        image: RGB.
        coverage: (H, W) in [0, 1]; 1 on the subject.

    Returns:
        None if the mask is empty or useless; see `masks.problem_of`.
    """
    if problem_of(coverage):
        return None
    mask = Image.fromarray(np.round(255 * coverage).astype(np.uint8))
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, GREY), mask)


def parts_on_grey(image: Image.Image, coverage: np.ndarray) -> list[Image.Image]:
    """Each connected part of an image's mask alone, in a square on a plain background.

    For images of several subjects: a segmenter that does not tell classes apart marks all of them.

    Args:
        image: RGB.
        coverage: (H, W) in [0, 1]; 1 on the subjects.

    Returns:
        RGB images, one per part; parts that cover less than `SMALLEST` of the image are left out.
    """
    labels, _ = ndimage.label(coverage > 0.5)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        own = labels[rows, columns] == number
        if own.sum() < SMALLEST * labels.size:
            continue
        part = image.convert("RGB").crop((columns.start, rows.start, columns.stop, rows.stop))
        side = round((1 + 2 * PART_MARGIN) * max(part.size))
        square = Image.new("RGB", (side, side), GREY)
        corner = ((side - part.width) // 2, (side - part.height) // 2)
        square.paste(part, corner, Image.fromarray(np.uint8(255) * own))
        found.append(square)
    return found


@dataclass
class Cutouts:
    """Cuts out subjects and counts the images where that failed.

    Attributes:
        segmenter: marks the class.
        class_prompts: of each concept.
        total, whole: images so far, and those of them that were left whole because their mask was useless.
    """

    segmenter: Segmenter
    class_prompts: Mapping[str, str]
    total: int = 0
    whole: int = 0

    def cut(self, images: Sequence[Image.Image], concept: str) -> list[Image.Image]:
        """Each image's subject on grey; the whole image where its mask is useless."""
        rgb = [image.convert("RGB") for image in images]
        masks = self.segmenter.masks(rgb, self.class_prompts[concept])
        found = [on_grey(image, coverage) for image, coverage in zip(rgb, masks, strict=True)]
        self.total += len(found)
        self.whole += found.count(None)
        return [cutout or image for cutout, image in zip(found, rgb, strict=True)]

    def parts(self, images: Sequence[Image.Image], concept: str) -> list[list[Image.Image]]:
        """The subjects that each image may show, one by one; the whole image where its mask has no part."""
        masks = self.segmenter.masks([image.convert("RGB") for image in images], self.class_prompts[concept])
        return [parts_on_grey(image, mask) or [image] for image, mask in zip(images, masks, strict=True)]


@dataclass(frozen=True)
class Judges:
    """The models of an evaluation; those that are None give no figure.

    Attributes:
        clip: text alignment and image alignment (`evaluate.clip`).
        identity: similarity of subjects (`evaluate.identity`).
        cutouts: for the image alignment of subjects without their background (`evaluate.masked`).
    """

    clip: Clip
    identity: VisionEncoder | None = None
    cutouts: Cutouts | None = field(default=None)

    @classmethod
    def load(cls, params: Params) -> "Judges":
        """Load the models that section `evaluate` names.

        Raises:
            UserError: one of them cannot be loaded, or the segmenter does not know a class.
        """
        device, settings, segmenter = base.device(params.base.device), params.evaluate, params.evaluation_segmenter
        key = "prepare.segmenter" if segmenter == params.prepare.segmenter else "prepare.masks"
        classes = {name: concept.class_prompt for name, concept in params.concepts.items()}
        cutouts = Cutouts(Segmenter(segmenter, device, key=key), classes) if segmenter else None
        if cutouts:
            for name in classes:
                cutouts.cut([], name)  # a class that it does not know is refused before images are generated
        identity = VisionEncoder.load(settings.identity, device) if settings.identity else None
        return cls(Clip.load(settings.clip, device), identity, cutouts)

    @property
    def alignments(self) -> tuple[str, ...]:
        """Names of the metrics that compare images with photos."""
        optional = {"masked_image_alignment": self.cutouts, "identity": self.identity}
        return ("image_alignment", *(name for name, judge in optional.items() if judge))

    def embed(self, alignment: str, images: Sequence[Image.Image], concept: str) -> np.ndarray:
        """Features (N, D) of norm 1 by which an alignment compares images of a concept."""
        if alignment == "masked_image_alignment" and self.cutouts:
            return self.clip.images(self.cutouts.cut(images, concept))
        return self.features(images) if alignment == "identity" else self.clip.images(images)

    def align(
        self, alignment: str, images: Sequence[Image.Image], concept: str, photos: np.ndarray, *, apart: bool = False
    ) -> np.ndarray:
        """An alignment of images to a concept's photos, (N,).

        Args:
            photos: the photos' features, by `embed`.
            apart: the images show other concepts as well. Identity and the masked image alignment are then those of the
                part that is most like the photos; image alignment stays the whole image's (section 4.2 of the paper).
        """
        if not images:
            return np.zeros(0)
        if not apart or self.cutouts is None or alignment == "image_alignment":
            return image_alignment(self.embed(alignment, images, concept), photos)
        parts = self.cutouts.parts(images, concept)
        every = [part for each in parts for part in each]
        values = image_alignment(self.features(every) if alignment == "identity" else self.clip.images(every), photos)
        ends = np.cumsum([len(each) for each in parts])
        return np.array([own.max() for own in np.split(values, ends[:-1])])

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features (N, D) of norm 1 by which images are compared with one another: of `identity`, else of CLIP."""
        return (self.identity or self.clip).images(images)
