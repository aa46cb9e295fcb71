"""Do the figures rank the right individual first? Measured in the embedded world, where the truth is known.

In each trial two individuals of one class are drawn that no judge has seen: the right one, with five instance photos,
and a wrong one. A figure ranks rightly if a picture of the right individual has a higher value than one of the wrong.
Backgrounds, sizes and places are drawn as well, or copied from an instance photo.

Needs the sprites (`python -m world.sources`, `python -m world.sprites`). Writes the tables of
docs/do-the-figures-rank-rightly.md.

    python -m benchmarks.ranking --trials 300
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from customdiff.evaluation.judges import Cutouts, Judges
from customdiff.evaluation.metrics import bootstrap_interval, image_alignment
from customdiff.models.clip import Clip
from customdiff.models.vision import VisionEncoder
from customdiff.preparation.segmenter import Segmenter
from world.backgrounds import background
from world.loop import load_params
from world.scenes import BACKGROUNDS, SIDE, Sprites, pasted

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/do-the-figures-rank-rightly.md"
PHOTOS = 5
CLASS = "subject"  # the embedded segmenter knows only subject and background

Figure = Callable[[Sequence[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class Shot:
    """How an individual is photographed.

    Attributes:
        place: name of the background.
        seed: of the background's pixels.
        longer: the subject's longer side, px.
        centre: of the subject, (x, y) in px.
    """

    place: str
    seed: int
    longer: float
    centre: tuple[float, float]


def shot(rng: np.random.Generator, place: str) -> Shot:
    """A shot of any size and place of the subject."""
    longer = float(rng.uniform(0.45, 0.9) * SIDE)
    spread = (SIDE - longer) / 2
    x, y = SIDE / 2 + rng.uniform(-spread, spread, 2)
    return Shot(place, int(rng.integers(2**31)), longer, (float(x), float(y)))


def photograph(sprite: Image.Image, how: Shot) -> Image.Image:
    """A picture of a premultiplied sprite, 128 px; the same shot has the same background, pixel by pixel."""
    canvas = background(how.place, np.random.default_rng(how.seed), SIDE).copy()
    pasted(canvas, sprite, how.longer, how.centre)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Trial:
    """Pictures of one trial.

    Attributes:
        photos: instance photos of the right individual, each on another background.
        pictures: by name: `right` and `wrong` each on another background than any photo has; `copied`: the wrong
            individual in the shot of the first photo; `background`, `size` and `place`: `right` with only that changed.
    """

    photos: list[Image.Image]
    pictures: dict[str, Image.Image]


def trial(rng: np.random.Generator, right: Image.Image, wrong: Image.Image) -> Trial:
    """Draw the pictures of two individuals."""
    *places, here, there, elsewhere = (str(each) for each in rng.permutation(BACKGROUNDS)[: PHOTOS + 3])
    shots = [shot(rng, place) for place in places]
    how, other = shot(rng, here), shot(rng, elsewhere)
    how = replace(how, longer=0.6 * SIDE, centre=(0.45 * SIDE, 0.5 * SIDE))
    pictures = {
        "right": photograph(right, how),
        "wrong": photograph(wrong, shot(rng, there)),
        "copied": photograph(wrong, shots[0]),
        "background": photograph(right, replace(how, place=elsewhere, seed=other.seed)),
        "size": photograph(right, replace(how, longer=0.85 * SIDE)),
        "place": photograph(right, replace(how, centre=(0.62 * SIDE, 0.62 * SIDE))),
    }
    return Trial([photograph(right, each) for each in shots], pictures)


def figures(root: Path = ROOT) -> dict[str, Figure]:
    """Features (N, D) of pictures by the name of the figure that compares them."""
    judge, clip = Clip.load(root / "data/judge"), Clip.load(root / "data/clip")
    cutouts = Cutouts(Segmenter(str(root / "data/segmenter"), torch.device("cpu")), {CLASS: CLASS})
    judges = Judges(judge, VisionEncoder.load(root / "data/identity"), cutouts)
    return {
        "image alignment, data/clip": clip.images,
        "image alignment, data/judge": judge.images,
        "masked image alignment, data/judge": lambda images: judges.embed("masked_image_alignment", images, CLASS),
        "identity, data/identity": lambda images: judges.embed("identity", images, CLASS),
        "identity of cut-out subjects (not in `evaluate`)": lambda images: judges.features(cutouts.cut(images, CLASS)),
    }


def values(trials: Sequence[Trial], figure: Figure) -> dict[str, np.ndarray]:
    """A figure of each kind of picture, (T,): the mean cosine to the trial's photos."""
    names = list(trials[0].pictures)
    photos = figure([photo for each in trials for photo in each.photos])
    pictures = figure([each.pictures[name] for each in trials for name in names])
    rows = [
        image_alignment(pictures[len(names) * i : len(names) * (i + 1)], photos[PHOTOS * i : PHOTOS * (i + 1)])
        for i in range(len(trials))
    ]
    return dict(zip(names, np.array(rows).T, strict=True))


def rates(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whether the right individual has the higher value, (T,), with the wrong one on another or a copied background."""
    return {name: (found["right"] > found[name]).astype(float) for name in ("wrong", "copied")}


def shifts(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean absolute change by background, size and place, relative to the mean gap between right and wrong."""
    gap = float(np.mean(found["right"] - found["wrong"]))
    return {
        name: float(np.mean(np.abs(found[name] - found["right"]))) / gap for name in ("background", "size", "place")
    }


def draw_trials(groups: Sequence[Sequence[Image.Image]], count: int, seed: int) -> list[Trial]:
    """Trials of pairs of individuals; `groups`: sprites by class, at least two of each."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        group = groups[number % len(groups)]
        right, wrong = (group[i] for i in rng.permutation(len(group))[:2])
        found.append(trial(rng, right, wrong))
    return found


def held_out() -> dict[str, list[list[Image.Image]]]:
    """Sprites of individuals that the identity encoder has not seen, by class: looks of known classes, and classes."""
    from world.train_identity import all_individuals

    params = load_params()["identity"]
    unseen = set(params["unseen_subjects"])
    everyone = all_individuals(Sprites.load(ROOT / "world/build/sprites"), params["hues"])
    flat = {subject: [one for found in pictures for one in found] for subject, pictures in everyone.items()}
    aside = [[one.sprite for one in found if one.is_aside] for subject, found in flat.items() if subject not in unseen]
    return {
        "unseen looks": [found for found in aside if len(found) >= 2],
        "unseen classes": [[one.sprite for one in flat[subject]] for subject in sorted(unseen)],
    }


def tables(trials: Mapping[str, Sequence[Trial]], judged: Mapping[str, Figure]) -> str:
    """Markdown: rates by held-out group and background with 95 % intervals, and shifts over all trials."""
    count = sum(map(len, trials.values()))
    heads = [f"{group}, {kind}" for group in trials for kind in ("other background", "copied background")]
    ranks = [f"| figure | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    moves = ["| figure | background | size | place |", "| --- | --- | --- | --- |"]
    for name, figure in judged.items():
        found = {group: values(drawn, figure) for group, drawn in trials.items()}
        cells = [_rate(each) for group in trials for each in rates(found[group]).values()]
        ranks.append(f"| {name} | {' | '.join(cells)} |")
        together = {
            kind: np.concatenate([each[kind] for each in found.values()]) for kind in next(iter(found.values()))
        }
        moves.append(f"| {name} | {' | '.join(f'{100 * each:.0f} %' for each in shifts(together).values())} |")
    return "\n".join(
        [
            f"How often the right individual has the higher value ({count} trials, 95 % interval; chance is 50 %):",
            "",
            *ranks,
            "",
            "Mean change if only the background, the size or the place changes, as a share of the mean gap between the "
            "right and the wrong individual:",
            "",
            *moves,
        ]
    )


def _rate(right: np.ndarray) -> str:
    low, high = bootstrap_interval([right], resamples=2000, seed=0)
    return f"{100 * right.mean():.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def write(text: str, page: Path) -> None:
    """Replace what lies between the page's markers."""
    marked = re.compile(r"(<!-- tables -->\n).*(<!-- end of tables -->)", re.DOTALL)
    page.write_text(
        marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text(encoding="utf-8")), encoding="utf-8"
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="trials of each group (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trials = {group: draw_trials(found, options.trials, options.seed) for group, found in held_out().items()}
    text = tables(trials, figures())
    write(text, PAGE)
    print(text)


if __name__ == "__main__":
    main()
