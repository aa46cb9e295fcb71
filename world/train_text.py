"""Fine-tune the base's text encoder so that the tokens of a phrase describe that phrase alone.

CLIP's loss sees only the end token. In "a purple cat next to a white teapot in the snow", the states of the second
subject's tokens described the first subject as much as their own, and those of the background described the subjects
and their colours, so a UNet painted everything in one colour. Here the encoder is distilled from its earlier weights.
The tokens of the second subject get the states that they have in a caption without the first subject; those of the
background get the states that they have behind another subject, drawn anew each time, which in the mean are those
behind no subject in particular; all other tokens, the end token included, keep their states. The embeddings of
captions, and therefore the CLIP, change little.
"""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from world.captions import JOINTS, caption_of, choice, named
from world.catalogue import COLOURS, VARIED, singular
from world.latents import load_clip, text_model
from world.loop import fit, load_params
from world.scenes import BACKGROUNDS, SIZES


@dataclass(frozen=True)
class Caption:
    """A caption in its parts.

    Attributes:
        opening: what precedes the first subject.
        first: the first of two subjects, and what joins them; empty where there is one.
        last: the second subject, or the only one.
        place: what follows.
    """

    opening: str
    first: str
    last: str
    place: str

    def __str__(self) -> str:
        return joined(self.opening, self.first, self.last, self.place)


def joined(*parts: str) -> str:
    """Parts of a caption, those that are not empty, as one."""
    return " ".join(part for part in parts if part)


def cut(caption: str, subjects: tuple[str, ...], colours: tuple[str | None, ...]) -> Caption:
    """A caption of one or two subjects, and the colours that it says of them, in its parts.

    A caption in another wording than that of `named`, such as "a very small red cat", is all opening.
    """
    *others, last = (named(subject, colour) for subject, colour in zip(subjects, colours, strict=True))
    firsts = [joined(*others, joint) for joint in JOINTS] if others else [""]
    first = next((first for first in firsts if joined(first, last) in caption), None)
    if first is None:
        return Caption(caption, "", "", "")
    opening, _, place = caption.partition(joined(first, last))
    return Caption(opening.strip(), first, last, place.strip())


@dataclass(frozen=True)
class PhraseTarget:
    """A phrase of a caption, and the other caption whose states of the phrase are its target.

    Attributes:
        words: the phrase.
        before: what precedes it in the caption.
        before_elsewhere: what precedes it in the other caption.
        after_elsewhere: what follows it there.
    """

    words: str
    before: str
    before_elsewhere: str
    after_elsewhere: str = ""

    @property
    def elsewhere(self) -> str:
        """The other caption."""
        return joined(self.before_elsewhere, self.words, self.after_elsewhere)


def phrase_targets(caption: Caption, other: str) -> list[PhraseTarget]:
    """Targets of the background: behind the subject `other`; and of the second of two subjects: without the first."""
    opening, first, last, place = caption.opening, caption.first, caption.last, caption.place
    targets = [PhraseTarget(place, joined(opening, first, last), joined(opening, other))]
    if first:
        targets.append(PhraseTarget(last, joined(opening, first), opening, place))
    return targets


def draw_caption(rng: np.random.Generator, params: dict) -> Caption:
    """A caption of the UNet's subjects in one of the world's wordings."""
    subjects = tuple(VARIED[i] for i in rng.choice(len(VARIED), 1 + (rng.random() < params["pairs"]), replace=False))
    colours = tuple(choice(rng, tuple(COLOURS)) if rng.random() < params["colours"] else None for _ in subjects)
    background = choice(rng, BACKGROUNDS)
    size = choice(rng, tuple(SIZES)) if len(subjects) == 1 else "normal"
    caption = caption_of(rng, subjects, len(subjects), "3d render", background, size, colours)
    return cut(caption, subjects, colours)


class Learner(nn.Module):
    """The text encoder, and its earlier weights as the teacher."""

    def __init__(self, text: CLIPTextModel, tokenizer: CLIPTokenizer, weight: float) -> None:
        """`weight` is the weight of tokens with new targets relative to the others."""
        super().__init__()
        self.text = text
        self.text.get_input_embeddings().requires_grad_(False)
        self.tokenizer, self.weight = tokenizer, weight
        self._teacher = [copy.deepcopy(text).eval().requires_grad_(False)]  # in a list: not among the weights

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Token ids (B, 24), padded as the pipeline pads."""
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def length(self, words: str) -> int:
        """How many tokens words have."""
        return len(self.tokenizer(words, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def targets(
        self, captions: list[Caption], others: list[str], tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Target states (B, 24, width) of captions, and which tokens have new targets (B, 24).

        Args:
            others: for each caption the subject behind which the tokens of its background get their targets.
        """
        states = self.teacher(tokens)
        changed = torch.zeros(tokens.shape, dtype=torch.bool)
        pairs = zip(captions, others, strict=True)
        phrases = [(row, phrase) for row, pair in enumerate(pairs) for phrase in phrase_targets(*pair)]
        elsewhere = self.teacher(self.tokens([phrase.elsewhere for _, phrase in phrases]))
        for (row, phrase), found in zip(phrases, elsewhere, strict=True):
            here, there = (1 + self.length(words) for words in (phrase.before, phrase.before_elsewhere))
            count = min(self.length(phrase.words), tokens.shape[1] - 1 - here)  # the last token is the end's
            states[row, here : here + count] = found[there : there + count]
            changed[row, here : here + count] = True
        return states, changed

    def teacher(self, tokens: torch.Tensor) -> torch.Tensor:
        """States (B, 24, width) by the earlier weights."""
        return self._teacher[0](tokens).last_hidden_state

    def forward(self, captions: list[Caption], others: list[str]) -> dict[str, torch.Tensor]:
        """The squared error of the states: `own` of tokens with new targets, `kept` of all others."""
        tokens = self.tokens([str(caption) for caption in captions])
        states, changed = self.targets(captions, others, tokens)
        distances = (self.text(tokens).last_hidden_state - states).square().mean(dim=-1)
        own, kept = distances[changed].mean(), distances[~changed].mean()
        return {"loss": self.weight * own + kept, "own": own.detach(), "kept": kept.detach()}


def main() -> None:
    """Train, or continue."""
    params = load_params("text")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=params["minutes"])
    parser.add_argument("--restart", action="store_true", help="Fresh optimizer and clock.")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(params["seed"])
    clip, tokenizer = load_clip(arguments.work, tuned=False)
    learner = Learner(text_model(clip), tokenizer, params["weight"])

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([params["seed"], step])
        captions = [draw_caption(rng, params) for _ in range(params["batch"])]
        return learner(captions, [singular(choice(rng, VARIED)) for _ in captions])

    fit(
        arguments.work / "text",
        learner,
        loss_at,
        minutes=arguments.minutes,
        peak_lr=params["peak_lr"],
        muon=params["muon"],
        seed=params["seed"],
        restart=arguments.restart,
    )


if __name__ == "__main__":
    main()
