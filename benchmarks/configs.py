"""Configurations to measure: base model, resolution and options of both sides."""

from dataclasses import dataclass

from customdiff.errors import UserError

SEED = 42
BATCH_SIZE = 2  # instance images per step, and the same number of class images
IMAGES_A_STEP = 2 * BATCH_SIZE
MODIFIER_TOKEN, CLASS, INSTANCE_PROMPT = "<new1>", "cat", "photo of a {} cat"


@dataclass(frozen=True)
class Config:
    """One row of figures.

    Attributes:
        resolution: px.
        shape: name of the random weights in `models.SHAPES`; None: data/base, the embedded model.
        augmentation, hflip: as in params.yaml.
        class_images: how many lie in the class folder; the reference starts its loader's workers anew each time that
            it has seen them all.
        learning_rate: before it is scaled by the batch, as both sides do.
        prior_loss_weight: of the class images' loss.
        in_reference: whether the reference can train this model at all.
    """

    resolution: int
    shape: str | None
    augmentation: bool = True
    hflip: bool = True
    class_images: int = 200
    learning_rate: float = 1e-5
    prior_loss_weight: float = 1.0
    in_reference: bool = True


CONFIGS = {
    "embedded": Config(
        128, None, augmentation=False, hflip=False, class_images=50, learning_rate=1.5e-4, prior_loss_weight=0.3
    ),
    "quarter-256": Config(256, "quarter"),
    "sd14-512": Config(512, "sd14"),
    "sdxl-1024": Config(1024, "sdxl", in_reference=False),
}


def config(name: str) -> Config:
    """The configuration of that name.

    Raises:
        UserError: there is none.
    """
    if name not in CONFIGS:
        raise UserError(f"--config: {name!r} is not known; use one of {', '.join(CONFIGS)}")
    return CONFIGS[name]
