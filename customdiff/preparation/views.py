"""Views of photos: augmented, some of them on other backgrounds or beside another concept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from PIL import Image

from customdiff.config import Prepare
from customdiff.preparation import augmentation, backgrounds
from customdiff.preparation.augmentation import View
from customdiff.preparation.examples import Example
from customdiff.preparation.masks import SubjectMask
from customdiff.preparation.together import Company, Cutout, cut_out


@dataclass(frozen=True)
class Views:
    """All views of some photos, in order: each with its caption (without prefix) and the subject's share of each
    latent pixel, (h, w) float32.

    Attributes:
        count: views of each photo.
        draw: makes a view of an image.
        factor: pixels per latent pixel.
        company: other concepts that `prepare.together` further views of each photo show its subject beside.
    """

    examples: list[Example]
    settings: Prepare
    count: int
    draw: Callable[..., View]
    factor: int
    seed: list[int]
    company: Company | None = None

    def __len__(self) -> int:
        beside = sum(cutout is not None for cutout in self._cutouts)
        return len(self.examples) * self.count + beside * self.settings.together

    @cached_property
    def _cutouts(self) -> list[Cutout | None]:
        """The subject of each photo that is shown beside others."""
        return [cut_out(example.path, example.mask) if self.company else None for example in self.examples]

    def __iter__(self) -> Iterator[tuple[View, str, np.ndarray]]:
        for index, example in enumerate(self.examples):
            with Image.open(example.path) as file:
                image = file.convert("RGB")
            alone = (self._on_a_background(example, image, index, number) for number in range(self.count))
            for number, (picture, caption, mask) in enumerate(chain(alone, self._beside(index, min(image.size)))):
                seed = [*self.seed, index, number]
                view = self._view(picture, seed)
                yield view, caption, self._subject(mask, view, seed)

    def _on_a_background(
        self, example: Example, image: Image.Image, index: int, number: int
    ) -> tuple[Image.Image, str, SubjectMask | None]:
        """The photo as one of its views shows it, on its own background or on another one, with caption and mask."""
        settings, mask, others = self.settings.backgrounds, example.mask, list(example.captions_on)
        name = backgrounds.name_of_view(settings, others, index, number, self.count) if others else None
        if mask is None or name is None:
            return image, example.caption, mask
        rng = np.random.default_rng([*self.seed, index, number, 1])  # apart from the augmentation's draws
        if settings.vary_place:
            image, coverage = backgrounds.moved(image, mask.coverage, rng)
            mask = replace(mask, coverage=coverage)
        return backgrounds.composite(image, mask.coverage, name, rng), example.captions_on[name], mask

    def _beside(self, index: int, side: int) -> Iterator[tuple[Image.Image, str, SubjectMask]]:
        """The views of a photo that show its subject beside another concept, with caption and mask of both."""
        cutout = self._cutouts[index]
        if self.company is None or cutout is None:
            return
        names = backgrounds.names(self.settings.backgrounds)
        for number in range(self.settings.together):
            rng = np.random.default_rng([*self.seed, index, number, 2])  # apart from the other views' draws
            image, coverage, caption = self.company.beside(cutout, names[(index + number) % len(names)], side, rng)
            yield image, caption, SubjectMask(coverage, "together")

    def _view(self, image: Image.Image, seed: list[int]) -> View:
        rng = np.random.default_rng(seed)
        turned = augmentation.flipped(image, rng) if self.settings.hflip else image
        return self.draw(turned, self.settings.resolution, self.factor, rng, self.settings.center_crop)

    def _subject(self, mask: SubjectMask | None, view: View, seed: list[int]) -> np.ndarray:
        """The subject's share of each latent pixel of a view; 1 everywhere where no mask is known."""
        if mask is None:
            return np.ones(view.mask.shape, np.float32)
        coverage = Image.fromarray(np.round(mask.coverage * 255).astype(np.uint8)).convert("RGB")
        share = (self._view(coverage, seed).pixels[0] + 1) / 2  # the same draws as the view's
        height, width = view.mask.shape
        return share.reshape(height, self.factor, width, self.factor).mean((1, 3)) * view.mask
