"""Images of the base model and of adapters, from the same prompts and seeds."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Base, Concept, Evaluate
from customdiff.errors import UserError
from customdiff.evaluation.base_image_cache import base_images
from customdiff.evaluation.prompts import Prompt
from customdiff.images import save_all
from customdiff.models.base import DTYPES, device, load_pipeline
from customdiff.models.modifier_tokens import without_tokens
from customdiff.models.sampling import generate, image_seed, set_scheduler


@dataclass(frozen=True)
class ImageRequest:
    """One image that every model generates.

    Attributes:
        prompt: what it shows.
        number: among the images of this prompt from one noise seed, from 0.
        seed: of its noise.
        repeat: from which noise seed, from 0; see `evaluate.seeds`.
    """

    prompt: Prompt
    number: int
    seed: int
    repeat: int = 0


@dataclass(frozen=True)
class ImagePair:
    """One prompt and seed, as the base model and as an adapter generated it.

    Attributes:
        prompt: what it shows.
        text: the prompt without modifier tokens, which both images are compared with.
        number: among the images of this prompt from one noise seed, from 0.
        base, customized: RGB.
        is_control: whether the adapter was given the class as well, without its token; see `drift`.
        repeat: from which noise seed, from 0; see `evaluate.seeds`.
    """

    prompt: Prompt
    text: str
    number: int
    base: Image.Image
    customized: Image.Image
    is_control: bool = False
    repeat: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the first image of its prompt."""
        return self.number == 0 and self.repeat == 0


@dataclass(frozen=True)
class Generation:
    """How to generate: sections `base`, `evaluate` and `concepts` of params.yaml, and the cache of base-model images.

    Attributes:
        cache: folder of cached base-model images; None: no cache.
    """

    base: Base
    settings: Evaluate
    concepts: Mapping[str, Concept]
    cache: Path | None = None

    def load_base(self) -> DiffusionPipeline:
        """The base model with the scheduler and precision of section `evaluate`."""
        pipe = load_pipeline(self.base, dtype=DTYPES[self.settings.precision], device=device(self.base.device))
        set_scheduler(pipe, self.settings.scheduler)
        return pipe

    def requests(self, prompts: Sequence[Prompt], num_images: int | None = None) -> list[ImageRequest]:
        """The images to generate, in order; each has a seed of its own, which other prompts do not change.

        The images of the noise seed n are those of an evaluation with `base.seed` + n.

        Args:
            num_images: per prompt and noise seed; None: `evaluate.num_images`.
        """
        return [
            ImageRequest(
                prompt,
                number,
                image_seed(self.base.seed + repeat, prompt.concept_label, prompt.template, number),
                repeat,
            )
            for prompt in prompts
            for repeat in range(self.settings.seeds)
            for number in range(num_images or self.settings.num_images)
        ]

    def texts(self, requests: Sequence[ImageRequest], subject: Callable[[Concept], str]) -> list[str]:
        """The text of each request; `subject` gives the words for a concept."""
        return [self.text(request.prompt, subject) for request in requests]

    def text(self, prompt: Prompt, subject: Callable[[Concept], str]) -> str:
        """The text of a prompt; `subject` gives the words for a concept."""
        return prompt.fill(*(subject(self.concepts[name]) for name in prompt.concepts))

    def reference_text(self, prompt: Prompt) -> str:
        """The text that both images of a prompt are compared with: no modifier tokens."""
        tokens = [self.concepts[name].modifier_token for name in prompt.concepts]
        return without_tokens(self.text(prompt, customized_subject), *tokens)


def class_subject(concept: Concept) -> str:
    """The words for a concept in prompts of the base model: "cat"."""
    return concept.class_prompt


def customized_subject(concept: Concept) -> str:
    """The words for a concept in prompts of an adapter: "<new1> cat"."""
    return concept.subject


def generate_pairs(
    generation: Generation, adapters: Mapping[str, Path], prompts: Sequence[Prompt], controls: Sequence[Prompt] = ()
) -> Iterator[tuple[str, list[ImagePair]]]:
    """Generate all prompts with the base model once, then with each adapter, from the same seeds.

    An adapter generates the prompts whose concepts it has learned. Adapters of one training replace one another in
    the same pipeline; for any other the base model is loaded again.

    Args:
        adapters: folders by the name that progress bars show.
        controls: prompts of which both models generate one image per noise seed, with the class for the subject; see
            `drift`.

    Yields:
        The name of each adapter, and its images beside the base model's, those of `controls` last.

    Raises:
        UserError: an adapter is damaged, was trained on another base model, or has learned none of the concepts, or
            one under another token; before anything is generated.
    """
    pipe = generation.load_base()
    for folder in adapters.values():
        learned = adapter.read(folder)
        adapter.check_base(pipe, learned)
        check_learned(learned.config, folder, generation.concepts)
    requests = generation.requests(prompts)
    before = cached_base_images(generation, pipe, requests)
    control_requests = generation.requests(controls, 1)
    controls_before = _control_base_images(generation, pipe, control_requests, dict(zip(requests, before, strict=True)))
    placed: Adapter | None = None
    for name, folder in adapters.items():
        learned = adapter.read(folder)
        if placed is not None and not adapter.is_replaceable(placed, learned):
            pipe, placed = generation.load_base(), None
        (adapter.inject if placed is None else adapter.replace)(pipe, learned)
        placed = learned
        concepts = set(learned.config.concepts)
        known = [place for place, request in enumerate(requests) if concepts.issuperset(request.prompt.concepts)]
        chosen = [requests[place] for place in known]
        images = generate_images(generation, pipe, chosen, customized_subject, name)
        pairs = pair_images(generation, chosen, [before[place] for place in known], images)
        shown = [request for request in control_requests if concepts.issuperset(request.prompt.concepts)]
        images = generate_images(generation, pipe, shown, class_subject, f"{name}, without token") if shown else []
        yield name, [*pairs, *_control_pairs(generation, shown, [controls_before[each] for each in shown], images)]


def _control_base_images(
    generation: Generation,
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    known: Mapping[ImageRequest, Image.Image],
) -> dict[ImageRequest, Image.Image]:
    """The base model's images of the controls; those of the concepts' own prompts are `known`."""
    rest = [request for request in requests if request not in known]
    images = cached_base_images(generation, pipe, rest) if rest else []
    return {**known, **dict(zip(rest, images, strict=True))}


def _control_pairs(
    generation: Generation,
    requests: Sequence[ImageRequest],
    base: Sequence[Image.Image],
    customized: Sequence[Image.Image],
) -> list[ImagePair]:
    """The images of controls of two models, side by side."""
    return [
        ImagePair(
            each.prompt,
            generation.text(each.prompt, class_subject),
            each.number,
            before,
            after,
            is_control=True,
            repeat=each.repeat,
        )
        for each, before, after in zip(requests, base, customized, strict=True)
    ]


def check_learned(adapter_config: AdapterConfig, folder: Path, concepts: Mapping[str, Concept]) -> None:
    """Refuse an adapter that has learned none of the concepts, or one of them under another token.

    The tokenizer would split an unknown token silently, and the images would be of another prompt.

    Raises:
        UserError: names the adapter's folder or the concept.
    """
    learned = {name: concept for name, concept in adapter_config.concepts.items() if name in concepts}
    if not learned:
        raise UserError(
            f"{folder}: has learned {', '.join(adapter_config.concepts)}, and none of {', '.join(concepts)}"
        )
    for name, concept in learned.items():
        if concept.modifier_token != concepts[name].modifier_token:
            raise UserError(
                f"concepts.{name}: {folder} has learned it as {concept.modifier_token}, "
                f"not as {concepts[name].modifier_token}"
            )


def cached_base_images(
    generation: Generation, pipe: DiffusionPipeline, requests: Sequence[ImageRequest]
) -> list[Image.Image]:
    """The base model's images, with the class for the subject; from the cache where it has them."""
    return base_images(
        generation.cache,
        pipe,
        generation.base,
        generation.settings,
        generation.texts(requests, class_subject),
        [request.seed for request in requests],
        lambda: generate_images(generation, pipe, requests, class_subject, "base model"),
    )


def generate_images(
    generation: Generation,
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    subject: Callable[[Concept], str],
    progress: str | None = None,
) -> list[Image.Image]:
    """Generate each request with the pipeline as it is."""
    settings = generation.settings
    return generate(
        pipe,
        generation.texts(requests, subject),
        [request.seed for request in requests],
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        batch_size=settings.batch_size,
        progress=progress,
    )


def pair_images(
    generation: Generation,
    requests: Sequence[ImageRequest],
    base: Sequence[Image.Image],
    customized: Sequence[Image.Image],
) -> list[ImagePair]:
    """The images of two models of the same requests, side by side."""
    return [
        ImagePair(
            request.prompt,
            generation.reference_text(request.prompt),
            request.number,
            before,
            after,
            repeat=request.repeat,
        )
        for request, before, after in zip(requests, base, customized, strict=True)
    ]


def write_images(pairs: Sequence[ImagePair], folder: Path) -> None:
    """Write `<folder>/base/<concept>/...png` and `<folder>/customized/<concept>/...png`, under the same names.

    Controls are in `without-token` instead of the concept's folder. The names end with the number of the image, for
    further noise seeds behind that of the seed: `-0.png`, `-1.png`, `-seed1-0.png`.
    """
    numbers: dict[tuple[Prompt, bool], int] = {}
    images = {}
    for pair in pairs:
        number = numbers.setdefault((pair.prompt, pair.is_control), len(numbers) + 1)
        label = "without-token" if pair.is_control else pair.prompt.concept_label
        words = re.sub(r"[^a-z0-9]+", "-", pair.prompt.template.lower()).strip("-")[:60]
        place = f"seed{pair.repeat}-{pair.number}" if pair.repeat else str(pair.number)
        for kind in ("base", "customized"):
            path = folder / kind / label / f"{number:02d}-{words}-{place}.png"
            images[path] = getattr(pair, kind)
    save_all(images)
