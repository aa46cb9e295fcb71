"""Merge adapters that were learned apart into one, without training: the paper's constrained least squares.

Kumari et al. 2023, section 3.2, for the keys and values W of each cross-attention layer, with W0 the base model's own
and W_i adapter i's:

    minimize ||W C_reg' - W0 C_reg'||^2   subject to   W C' = V,   V = [W_i C_i']

C_i (s_i, D) are the text states of concept i's target words, C_reg (n, D) those of captions without the new words. The
constraint makes each concept's words what its own adapter makes of them; the objective leaves all else to the base.

But an adapter draws its subject with the start token, the caption's other words and its padding as well, for it has
changed what they mean too. So the objective has a second term,

    + sum_i fidelity_i ||W D_i' - W_i D_i'||^2

where D_i (m_i, D) are all text states of captions that name concept i, and each square is divided by its number of
states. A fidelity of 0 is the paper's objective. The words before a token have the same states for every concept: on
them W gives a mean of the adapters, by their fidelities. The solution is closed with both terms, too; all is float64.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from customdiff import images
from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.adapters.config import AdapterConfig, LearnedConcept
from customdiff.errors import UserError
from customdiff.models import attention, modifier_tokens
from customdiff.models.text import text_encoders, text_of, token_ids
from customdiff.retrieval import clip_index
from customdiff.sources import image_folder

# The captions whose target words are held fast; {} is the token and its class, as in the paper's own code.
TARGETS = ("{}", "a photo of {}")
# What every direction of text space counts for beyond what the captions say, as a share of their mean over directions.
# Without it the solution is free where no caption reaches, weights grow to a hundred times the change that was learned,
# and words that are in no caption come out worse.
RIDGE = 0.1
# Target states are taken for dependent below this share of the largest singular value; fp32 states tell no finer.
DEPENDENT = 1e-6
FIDELITY = 10.0
BATCH_SIZE = 32


@dataclass(frozen=True)
class Problem:
    """All that is asked of a layer's weight, but for what each adapter makes of it; float64.

    Attributes:
        regularization: (D, D) mean of x x' over the states of captions that are to stay what they are.
        captions: by adapter, (D, D) mean of x x' over the states of captions that name its concepts.
        targets: by adapter, (s_i, D) states of its concepts' target words.
        fidelity: by adapter, weight of its captions beside the regularization.
    """

    regularization: Tensor
    captions: list[Tensor]
    targets: list[Tensor]
    fidelity: list[float]


@dataclass(frozen=True)
class Merged:
    """An adapter, and how it came out.

    Attributes:
        adapter: of all concepts.
        targets: states of target words that are held fast.
        rank: how many of them are independent.
        residual: the largest ||W C' - V|| / ||V|| of any layer.
    """

    adapter: Adapter
    targets: int
    rank: int
    residual: float


class Solver:
    """Solves a `Problem` for one layer after another: what depends on the texts alone is computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        gram = problem.regularization + sum(
            fidelity * moment for fidelity, moment in zip(problem.fidelity, problem.captions, strict=True)
        )
        gram = gram + RIDGE * problem.regularization.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        self.root = torch.linalg.cholesky(gram)  # gram = root root'
        # In x -> root^-1 x the objective is a plain norm, and the constraint's least-norm solution a pseudo-inverse,
        # which exists for dependent targets as well: they are met where they agree, else in the mean.
        targets = torch.linalg.solve_triangular(self.root, torch.cat(problem.targets).T, upper=False)
        left, values, right = torch.linalg.svd(targets, full_matrices=False)
        kept = values > DEPENDENT * values.max()
        self.rank = int(kept.sum())
        inverse = (right[kept].T / values[kept]) @ left[:, kept].T
        self.correction = torch.linalg.solve_triangular(self.root, inverse, upper=False, left=False)  # (s, D)

    def change(self, changes: Sequence[Tensor]) -> Tensor:
        """W - W0 of the merged adapter (out, D), from those of each adapter; float64.

        With G the gram of all texts and X_i the mean of x x' over adapter i's captions, the free minimum is
        sum_i fidelity_i change_i X_i G^-1; the nearest point to it in the norm of G that meets the constraint is
        reached along C G^-1.
        """
        problem = self.problem
        terms = zip(problem.fidelity, changes, problem.captions, strict=True)
        wanted = sum(fidelity * one @ moment for fidelity, one, moment in terms)
        free = torch.cholesky_solve(wanted.T, self.root).T
        missing = torch.cat([(one - free) @ states.T for one, states in zip(changes, problem.targets, strict=True)], 1)
        return free + missing @ self.correction


def merge(
    pipe: DiffusionPipeline,
    parts: Mapping[str, Adapter],
    captions: Sequence[str],
    fidelity: float | Sequence[float] = FIDELITY,
) -> Merged:
    """Merge adapters of one base model; several concepts an adapter are as good as one.

    Args:
        pipe: the base model, nothing put into it; it holds the merged adapter afterwards.
        parts: of method custom_diffusion and crossattn_kv, whole or compressed, by the name that an error gives them.
        captions: all of them say what is to stay; those that name a concept's class say, with the token put before it,
            how the concept is spoken of. Those with a token in them are left out.
        fidelity: see the module; one for all, or one for each of parts. 0 is the paper's objective.

    Raises:
        ValueError: as many fidelities as parts are needed.
        UserError: two adapters share a token or were learned on different base models, or one cannot be merged.
    """
    check(parts)
    fidelities = [float(fidelity)] * len(parts) if isinstance(fidelity, int | float) else list(fidelity)
    if len(fidelities) != len(parts):
        raise ValueError(f"{len(fidelities)} fidelities for {len(parts)} adapters")
    for name, part in parts.items():
        try:
            adapter.check_base(pipe, part)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    embeddings = {token: each for part in parts.values() for token, each in part.embeddings.items()}
    captions = [caption for caption in captions if not any(token in caption for token in embeddings)]
    if not captions:
        raise UserError("--captions: there is none without the new words; they should speak of other things")
    originals = {name: _double(weight) for name, weight in attention.originals(pipe.unet, "crossattn_kv").items()}
    full = [adapter.full_weights(part, pipe) for part in parts.values()]
    modifier_tokens.add_tokens(pipe, embeddings)
    solver = Solver(problem_of(pipe, list(parts.values()), captions, fidelities))
    states = torch.cat(solver.problem.targets)
    residual = 0.0
    placed = attention.inject_processors(pipe.unet, "crossattn_kv")
    for name, original in originals.items():
        learned = [_double(weights[name]) for weights in full]
        weight = original + solver.change([one - original for one in learned])
        values = torch.cat([targets @ one.T for one, targets in zip(learned, solver.problem.targets, strict=True)])
        residual = max(residual, float((states @ weight.T - values).norm() / values.norm()))
        placed[name].data.copy_(weight)
    return Merged(adapter.from_pipeline(pipe, merged_config(parts)), len(states), solver.rank, residual)


def check(parts: Mapping[str, Adapter]) -> None:
    """Refuse adapters that cannot be merged, whatever the base model.

    Raises:
        UserError: names the adapter and what is wrong.
    """
    owners: dict[str, str] = {}
    for name, part in parts.items():
        if part.config.method != "custom_diffusion":
            raise UserError(f"{name}: is of method {part.config.method}; only adapters of custom_diffusion are merged")
        if part.config.freeze_model != "crossattn_kv":
            raise UserError(
                f"{name}: learned queries and outputs too, which no text state fixes; only adapters of "
                "train.freeze_model crossattn_kv are merged"
            )
        for token in part.embeddings:
            if token in owners:
                raise UserError(
                    f"{name}: has the token {token}, and so has {owners[token]}; learn one of them under another"
                )
            owners[token] = name


def problem_of(
    pipe: DiffusionPipeline, parts: Sequence[Adapter], captions: Sequence[str], fidelity: list[float]
) -> Problem:
    """The text states that a merge is about.

    Args:
        pipe: with the modifier tokens of all parts.
        parts, captions, fidelity: see `merge`.
    """
    named, targets = [], []
    for part in parts:
        concepts = part.config.concepts.values()
        named.append([caption for concept in concepts for caption in captions_of(concept, captions)])
        targets.append(torch.cat([target_states(pipe, concept) for concept in concepts]))
    return Problem(moment(pipe, captions), [moment(pipe, each) for each in named], targets, fidelity)


def captions_of(concept: LearnedConcept, captions: Sequence[str]) -> list[str]:
    """Captions with a concept's token: its instance prompt, `TARGETS`, and each of `captions` that names its class."""
    own = [concept.instance_prompt.replace("{}", concept.modifier_token)]
    own += [target.replace("{}", concept.subject) for target in TARGETS]
    return own + [_class_word(concept).sub(lambda _: concept.subject, each, 1) for each in naming(concept, captions)]


def naming(concept: LearnedConcept, captions: Sequence[str]) -> list[str]:
    """Those of captions that name a concept's class."""
    return [caption for caption in captions if _class_word(concept).search(caption)]


@torch.no_grad()
def target_states(pipe: DiffusionPipeline, concept: LearnedConcept) -> Tensor:
    """States (s, D), float64, of a concept's target words: from the modifier token to the end token of `TARGETS`.

    The words before the token are left out, unlike in the paper's code, which holds those of the first concept fast:
    they do not know of the token, for CLIP's text encoder is causal, and are the same for every concept.
    """
    captions = [target.replace("{}", concept.subject) for target in TARGETS]
    (tokenizer, _), *_ = text_encoders(pipe).values()
    ids = token_ids(pipe, captions)[0]
    first = (ids == tokenizer.convert_tokens_to_ids(concept.modifier_token)).int().argmax(1, keepdim=True)
    last = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)  # where padding is the same token: the first
    place = torch.arange(ids.shape[1])
    return _double(text_of(pipe, captions).states)[(place >= first) & (place <= last)]


@torch.no_grad()
def moment(pipe: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Mean of x x' (D, D), float64, over all states of captions, as the UNet reads them: start and padding included."""
    total, count = 0, 0
    for start in range(0, len(captions), BATCH_SIZE):
        states = _double(text_of(pipe, list(captions[start : start + BATCH_SIZE])).states).flatten(0, 1)
        total, count = total + states.T @ states, count + len(states)
    return total / count


def merged_config(parts: Mapping[str, Adapter]) -> AdapterConfig:
    """The first adapter's config with the concepts of all, numbered where names repeat, and `merged_from`."""
    configs = [part.config for part in parts.values()]
    concepts: dict[str, LearnedConcept] = {}
    for config in configs:
        for name, concept in config.concepts.items():
            candidates = (f"{name}{number or ''}" for number in [0, *range(2, len(concepts) + 3)])
            concepts[next(each for each in candidates if each not in concepts)] = concept
    sources = [
        {"tokens": config.tokens} | config.model_dump(include={"steps", "seed"}, exclude_unset=True)
        for config in configs
    ]
    first = configs[0].model_dump(exclude={"steps", "seed", "compressed"}, exclude_unset=True)
    return AdapterConfig.model_validate(
        first | {"concepts": {name: each.model_dump() for name, each in concepts.items()}, "merged_from": sources}
    )


def read_captions(path: Path | str, limit: int = 1000, seed: int = 42) -> list[str]:
    """Captions from a file, one a line, or from a folder: `caption.txt` files, or a pool of images with captions.

    Args:
        limit: more than these are drawn from at random; the paper takes 1000.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--captions: {path} does not exist; give a text file with one a line, or a folder")
    try:
        files = sorted(path.rglob("caption.txt")) if path.is_dir() else [path]
        if path.is_dir() and not files:
            found = [image.caption or "" for image in clip_index.pool_images(path)]
        else:
            found = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions: {path} cannot be read ({images.brief(error)})") from error
    found = list(dict.fromkeys(caption for caption in map(image_folder.one_line, found) if caption))
    if not found:
        raise UserError(f"--captions: {path} holds no captions; give a text file with one a line")
    return found if len(found) <= limit else random.Random(seed).sample(found, limit)


def _class_word(concept: LearnedConcept) -> re.Pattern:
    return re.compile(rf"\b{re.escape(concept.class_prompt)}\b", re.IGNORECASE)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
