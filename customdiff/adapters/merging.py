"""Merging of separately trained adapters without training: the paper's constrained least squares.

Kumari et al. 2023, section 3.2, for the key and value weights W of each cross-attention layer, where W0 are the base
model's weights and W_i those of adapter i:

    minimize ||W C_reg' - W0 C_reg'||^2   subject to   W C' = V,   V = [W_i C_i']

C_i (s_i, D) are text states of concept i's target words, C_reg (n, D) those of captions without modifier tokens. The
constraint gives each concept's words the keys and values of its own adapter; the objective stays close to the base
model elsewhere.

An adapter also changes the keys and values of the start token, of other words and of padding, which contribute to its
images. The objective therefore has a second term,

    + sum_i fidelity_i ||W D_i' - W_i D_i'||^2

where D_i (m_i, D) are all text states of captions that name concept i. Each square is divided by its number of states.
With fidelity 0 the objective is the paper's. Words before a modifier token have the same states for every concept; for
them W is a mean of the adapters, weighted by fidelity. There is a closed-form solution, computed in float64.
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

# Captions whose target words are constrained; {} is the token and its class, as in the paper's code.
TARGETS = ("{}", "a photo of {}")
# Ridge term, as a share of the mean eigenvalue of the regularization. Without it the solution is undetermined in
# directions that no caption covers: changes grow to a hundred times the learned ones, and words in no caption suffer.
RIDGE = 0.1
# Relative singular value below which target states count as linearly dependent; fp32 states are not more precise.
DEPENDENT = 1e-6
FIDELITY = 10.0
BATCH_SIZE = 32


@dataclass(frozen=True)
class Problem:
    """The part of the least-squares problem that is the same for all layers, float64.

    Attributes:
        regularization: (D, D) mean of x x' over the states of captions without modifier tokens.
        captions: for each adapter, (D, D) mean of x x' over the states of captions that name its concepts.
        targets: for each adapter, (s_i, D) states of its concepts' target words.
        fidelity: for each adapter, weight of its captions relative to the regularization.
    """

    regularization: Tensor
    captions: list[Tensor]
    targets: list[Tensor]
    fidelity: list[float]


@dataclass(frozen=True)
class Merged:
    """A merged adapter and the quality of the solution.

    Attributes:
        adapter: adapter of all concepts.
        targets: number of constrained target states.
        rank: number of linearly independent target states.
        residual: largest ||W C' - V|| / ||V|| of all layers.
    """

    adapter: Adapter
    targets: int
    rank: int
    residual: float


class Solver:
    """Solver of a `Problem` for each layer; everything that depends only on the texts is computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        gram = problem.regularization + sum(
            fidelity * moment for fidelity, moment in zip(problem.fidelity, problem.captions, strict=True)
        )
        gram = gram + RIDGE * problem.regularization.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        self.root = torch.linalg.cholesky(gram)  # gram = root root'
        # In coordinates root^-1 x the objective is the Euclidean norm, and a pseudo-inverse gives the least-norm
        # solution of the constraint. It also exists for dependent targets: consistent ones are met, others on average.
        targets = torch.linalg.solve_triangular(self.root, torch.cat(problem.targets).T, upper=False)
        left, values, right = torch.linalg.svd(targets, full_matrices=False)
        kept = values > DEPENDENT * values.max()
        self.rank = int(kept.sum())
        inverse = (right[kept].T / values[kept]) @ left[:, kept].T
        self.correction = torch.linalg.solve_triangular(self.root, inverse, upper=False, left=False)  # (s, D)

    def change(self, changes: Sequence[Tensor]) -> Tensor:
        """The change W - W0 (out, D) of the merged adapter, float64.

        Let G be the Gram matrix of all texts and X_i the mean of x x' over adapter i's captions. The unconstrained
        minimum is sum_i fidelity_i change_i X_i G^-1. The nearest point in the norm of G that meets the constraint
        differs from it by a multiple of C G^-1.

        Args:
            changes: the change (out, D) by each adapter.
        """
        problem = self.problem
        terms = zip(problem.fidelity, changes, problem.captions, strict=True)
        zero = torch.zeros((), dtype=torch.float64)
        linear = sum((fidelity * change @ moment for fidelity, change, moment in terms), zero)
        free = torch.cholesky_solve(linear.T, self.root).T
        targets = zip(changes, problem.targets, strict=True)
        missing = torch.cat([(change - free) @ states.T for change, states in targets], 1)
        return free + missing @ self.correction


def merge(
    pipe: DiffusionPipeline,
    parts: Mapping[str, Adapter],
    captions: Sequence[str],
    fidelity: float | Sequence[float] = FIDELITY,
) -> Merged:
    """Merge adapters of one base model, each with one or more concepts.

    Args:
        pipe: the base model without an adapter; afterwards it has the merged adapter.
        parts: adapters of method custom_diffusion and crossattn_kv, possibly compressed, by their name in errors.
        captions: captions for the regularization. Those that name a concept's class are also used with the token
            inserted before it. Captions that contain a token are ignored.
        fidelity: see the module's docstring; one for all adapters or one for each. 0 is the paper's objective.

    Raises:
        ValueError: the number of fidelities differs from the number of adapters.
        UserError: adapters share a token or have different base models, or an adapter cannot be merged.
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
    embeddings = {token: embedding for part in parts.values() for token, embedding in part.embeddings.items()}
    captions = [caption for caption in captions if not any(token in caption for token in embeddings)]
    if not captions:
        raise UserError("--captions: all contain a modifier token; add captions without")
    originals = {name: _double(weight) for name, weight in attention.originals(pipe.unet, "crossattn_kv").items()}
    part_weights = [adapter.full_weights(part, pipe) for part in parts.values()]
    modifier_tokens.add_tokens(pipe, embeddings)
    solver = Solver(problem_of(pipe, list(parts.values()), captions, fidelities))
    states = torch.cat(solver.problem.targets)
    residual = 0.0
    parameters = attention.inject_processors(pipe.unet, "crossattn_kv")
    for name, original in originals.items():
        learned = [_double(weights[name]) for weights in part_weights]
        merged = original + solver.change([weight - original for weight in learned])
        targets = zip(learned, solver.problem.targets, strict=True)
        values = torch.cat([target_states @ weight.T for weight, target_states in targets])
        residual = max(residual, float((states @ merged.T - values).norm() / values.norm()))
        parameters[name].data.copy_(merged)
    return Merged(adapter.from_pipeline(pipe, merged_config(parts)), len(states), solver.rank, residual)


def check(parts: Mapping[str, Adapter]) -> None:
    """Check that adapters can be merged, apart from their base model.

    Raises:
        UserError: an adapter has another method or freeze_model, or two share a token.
    """
    owners: dict[str, str] = {}
    for name, part in parts.items():
        if part.config.method != "custom_diffusion":
            raise UserError(f"{name}: method {part.config.method} cannot be merged; only custom_diffusion can")
        if part.config.freeze_model != "crossattn_kv":
            raise UserError(
                f"{name}: freeze_model {part.config.freeze_model} cannot be merged, because queries and outputs do not "
                "depend on text states; only crossattn_kv can"
            )
        for token in part.embeddings:
            owner = owners.setdefault(token.casefold(), name)
            if owner != name:
                raise UserError(f"{name}: token {token} is also in {owner}; train one with another token")


def problem_of(
    pipe: DiffusionPipeline, parts: Sequence[Adapter], captions: Sequence[str], fidelity: list[float]
) -> Problem:
    """The least-squares problem of a merge.

    Args:
        pipe: base model with the modifier tokens of all adapters.
        parts, captions, fidelity: see `merge`.
    """
    concept_captions, targets = [], []
    for part in parts:
        concepts = part.config.concepts.values()
        concept_captions.append([caption for concept in concepts for caption in captions_of(concept, captions)])
        targets.append(torch.cat([target_states(pipe, concept) for concept in concepts]))
    moments = [moment(pipe, texts) for texts in concept_captions]
    return Problem(moment(pipe, captions), moments, targets, fidelity)


def captions_of(concept: LearnedConcept, captions: Sequence[str]) -> list[str]:
    """Captions with a concept's token: its instance prompt, `TARGETS`, and those of `captions` that name its class."""
    own = [concept.instance_prompt.replace("{}", concept.modifier_token)]
    own += [target.replace("{}", concept.subject) for target in TARGETS]
    pattern = _class_pattern(concept)
    return own + [pattern.sub(lambda _: concept.subject, caption, 1) for caption in naming_class(concept, captions)]


def naming_class(concept: LearnedConcept, captions: Sequence[str]) -> list[str]:
    """The captions that name a concept's class."""
    return [caption for caption in captions if _class_pattern(concept).search(caption)]


@torch.no_grad()
def target_states(pipe: DiffusionPipeline, concept: LearnedConcept) -> Tensor:
    """States (s, D), float64, of a concept's target words: from the modifier token to the end token of `TARGETS`.

    Unlike in the paper's code, which constrains those of the first concept, words before the token are excluded: CLIP's
    text encoder is causal, so their states do not depend on the token and are the same for every concept.
    """
    captions = [target.replace("{}", concept.subject) for target in TARGETS]
    (tokenizer, _), *_ = text_encoders(pipe).values()
    ids = token_ids(pipe, captions)[0]
    first = (ids == tokenizer.convert_tokens_to_ids(concept.modifier_token)).int().argmax(1, keepdim=True)
    last = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)  # first, as padding may be the same
    position = torch.arange(ids.shape[1])
    return _double(text_of(pipe, captions).states)[(position >= first) & (position <= last)]


@torch.no_grad()
def moment(pipe: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Mean of x x' (D, D), float64, over all states of captions, including start token and padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(captions), BATCH_SIZE):
        states = _double(text_of(pipe, list(captions[start : start + BATCH_SIZE])).states).flatten(0, 1)
        total, count = total + states.T @ states, count + len(states)
    return total / count


def merged_config(parts: Mapping[str, Adapter]) -> AdapterConfig:
    """The first adapter's config with the concepts of all, repeated names numbered, and with `merged_from`."""
    configs = [part.config for part in parts.values()]
    concepts: dict[str, LearnedConcept] = {}
    for config in configs:
        for name, concept in config.concepts.items():
            candidates = (f"{name}{number or ''}" for number in [0, *range(2, len(concepts) + 3)])
            concepts[next(candidate for candidate in candidates if candidate not in concepts)] = concept
    sources = [
        {"tokens": config.tokens} | config.model_dump(include={"steps", "seed"}, exclude_unset=True)
        for config in configs
    ]
    first = configs[0].model_dump(exclude={"steps", "seed", "compressed"}, exclude_unset=True)
    dumped = {name: concept.model_dump() for name, concept in concepts.items()}
    return AdapterConfig.model_validate(first | {"concepts": dumped, "merged_from": sources})


def read_captions(path: Path | str, limit: int = 1000, seed: int = 42) -> list[str]:
    """Read captions from a text file with one per line, or from a folder of `caption.txt` files or captioned images.

    Args:
        limit: maximum number of captions, chosen at random; 1000 in the paper.
        seed: seed of the choice.

    Raises:
        UserError: the path cannot be read or contains no captions.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--captions: {path} does not exist; give a text file with one caption per line, or a folder")
    captions = _captions(path)
    if not captions:
        raise UserError(f"--captions: {path} contains no captions; give a text file with one caption per line")
    return captions if len(captions) <= limit else random.Random(seed).sample(captions, limit)


def has_captions(path: Path) -> bool:
    """Whether `read_captions` would find any."""
    return path.exists() and bool(_captions(path))


def _captions(path: Path) -> list[str]:
    try:
        files = sorted(path.rglob("caption.txt")) if path.is_dir() else [path]
        if path.is_dir() and not files:
            texts = [image.caption or "" for image in clip_index.pool_images(path)]
        else:
            texts = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions: {path} cannot be read ({images.brief(error)})") from error
    return list(dict.fromkeys(caption for caption in map(image_folder.one_line, texts) if caption))


def _class_pattern(concept: LearnedConcept) -> re.Pattern:
    return re.compile(rf"\b{re.escape(concept.class_prompt)}\b", re.IGNORECASE)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
