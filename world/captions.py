"""Captions of scenes: several wordings for what is there, among them those of Custom Diffusion's augmentation."""

from __future__ import annotations

import numpy as np

from world.catalogue import COLOURS, article, background_phrase, plural, singular

JOINTS = ("next to", "and")  # between two subjects


def choice(rng: np.random.Generator, options: tuple | list):
    """One of the options, as it is."""
    return options[rng.integers(len(options))]


def place_phrase(rng: np.random.Generator, background: str) -> str:
    """The caption's words for the background; sometimes none at all."""
    draw = rng.random()
    if draw < 0.12:
        return ""
    if background in COLOURS and draw < 0.35:
        return choice(rng, (f" on {background}", f" with {article(background)} background"))
    return " " + background_phrase(background)


def named(subject: str, colour: str | None) -> str:
    """A subject behind its article, and its colour where it is said: "a red car", "an apple", "green grapes"."""
    if colour is None:
        return singular(subject)
    return f"{colour} {subject}" if singular(subject) == subject else article(f"{colour} {subject}")


def thing_phrase(
    rng: np.random.Generator, subjects: tuple[str, ...], count: int, colours: tuple[str | None, ...]
) -> str:
    """The caption's words for what is shown, without the background."""
    if len(subjects) == 2:
        one, other = (named(subject, colour) for subject, colour in zip(subjects, colours, strict=True))
        return f"{one} {choice(rng, JOINTS)} {other}"
    if count > 1:
        colour = f"{colours[0]} " if colours[0] else ""
        return f"{('two', 'three')[count - 2]} {colour}{plural(subjects[0])}"
    return named(subjects[0], colours[0])


def caption_of(
    rng: np.random.Generator,
    subjects: tuple[str, ...],
    count: int,
    style: str | None,
    background: str,
    size: str,
    colours: tuple[str | None, ...] | None = None,
) -> str:
    """A caption in one of the wordings.

    Args:
        colours: what is said of each subject's own colour; nothing by default.
    """
    colours = colours or (None,) * len(subjects)
    thing = thing_phrase(rng, subjects, count, colours)
    kinds = ("photo", "photo", "picture")
    kind = style if style and rng.random() < 0.45 else choice(rng, (None, *kinds))
    place = place_phrase(rng, background)
    if size == "very small":
        if kind is None:
            small = f"a very small {colours[0] + ' ' if colours[0] else ''}{subjects[0]}"
            return choice(rng, (f"{small}{place}", f"{thing} far away{place}"))
        return choice(rng, ("very small ", "a far away ")) + f"{kind} of {thing}{place}"
    if size == "close up":
        if kind is None:
            return choice(rng, ("zoomed in ", "close up ", "a close up of ")) + thing + place
        return choice(rng, ("zoomed in ", "close up ")) + f"{kind} of {thing}{place}"
    if kind is None:
        return thing + place
    return (f"{kind} of " if kind == "photo" and rng.random() < 0.5 else f"{article(kind)} of ") + thing + place
