"""Images of the base model and of adapters from one prompt and seed; pipelines stay loaded between images."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from customdiff.adapters.strength import set_strength
from customdiff.config import Evaluate
from customdiff.errors import UNPRINTABLE, UserError
from customdiff.models import base, sampling
from customdiff.models.modifier_tokens import without_tokens
from customdiff.training import checkpoints

LAST, EXAMPLES = Path("models/adapter"), Path("data/adapters")
KEPT = 2  # pipelines in memory


@dataclass(frozen=True)
class Drawing:
    """What one image pair, or a base image and two adapters' images, is drawn from.

    Attributes:
        adapters: folders, one or two.
        strength: of both; see `strength.set_strength`.
    """

    prompt: str
    adapters: tuple[Path, ...]
    seed: int
    steps: int
    guidance_scale: float
    strength: float = 1.0


@dataclass
class Player:
    """Draws one image at a time, with the sampler of section `evaluate`."""

    settings: Evaluate
    device: str
    _pipes: dict[tuple, tuple[DiffusionPipeline, Adapter]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, drawing: Drawing) -> Iterator[Image.Image]:
        """The base model's image, with the class for the subject, then that of each adapter, from the same noise.

        Raises:
            UserError: the prompt is empty, an adapter cannot be read, or its base model cannot be loaded.
        """
        if not drawing.prompt.strip() or UNPRINTABLE.search(drawing.prompt):
            raise UserError("the prompt is empty, or has a character that cannot be printed; write a prompt")
        yield self._draw(drawing.adapters[0], drawing, is_base=True)
        for folder in drawing.adapters:
            yield self._draw(folder, drawing)

    def _draw(self, folder: Path, drawing: Drawing, *, is_base: bool = False) -> Image.Image:
        with self._lock:  # held for one image, so that several pages take turns
            pipe, learned = self._pipe(folder)
            set_strength(pipe, learned, 0 if is_base else drawing.strength)
            prompt = without_tokens(drawing.prompt, *learned.embeddings) if is_base else drawing.prompt
            return self._image(pipe, prompt, drawing)

    def _image(self, pipe: DiffusionPipeline, prompt: str, drawing: Drawing) -> Image.Image:
        (image,) = sampling.generate(
            pipe,
            [prompt],
            [drawing.seed],
            steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            eta=self.settings.eta,
            progress=None,
        )
        return image

    def _pipe(self, folder: Path) -> tuple[DiffusionPipeline, Adapter]:
        """The base model with an adapter, loaded again if the adapter was trained again."""
        key = (folder, (folder / CONFIG_FILE).stat().st_mtime_ns if (folder / CONFIG_FILE).is_file() else 0)
        if key not in self._pipes:
            chosen = read_config(folder).base_model(None)
            pipe = base.load_pipeline(
                chosen, dtype=base.DTYPES[self.settings.precision], device=base.device(self.device)
            )
            sampling.set_scheduler(pipe, self.settings.scheduler)
            learned = adapter.load(pipe, folder)
            self._pipes = dict(list(self._pipes.items())[1 - KEPT :]) | {key: (pipe, learned)}
        return self._pipes[key]


def adapter_folders() -> dict[Path, str]:
    """The adapters of this project with a label: of the last training, its checkpoints, other folders, the example."""
    found = {LAST: "last training"}
    for run in checkpoints.find_runs()[:1]:
        found |= {path: f"checkpoint after {checkpoints.step_of(path)} steps" for path in run.checkpoints()}
    for parent in (LAST.parent, EXAMPLES):
        for path in sorted(parent.glob("*/")):
            found.setdefault(Path(path), path.as_posix())
    return {path: label for path, label in found.items() if (path / CONFIG_FILE).is_file()}


def subjects_of(folders: Sequence[Path]) -> list[str]:
    """The tokens with their classes, such as `<new1> cat`, that prompts for these adapters can name."""
    configs: list[AdapterConfig] = [read_config(folder) for folder in folders]
    return list(dict.fromkeys(concept.subject for each in configs for concept in each.concepts.values()))
