"""An image is a function of its prompt and its seed, whatever is drawn beside it."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from customdiff.errors import UserError
from customdiff.models.sampling import generate, image_seed, set_scheduler

PROMPTS = ["photo of a cat", "a dog on the grass", "photo of a cat", "red pot"]
SEEDS = [7, 8, 9, 7]


@pytest.fixture
def pipe(tiny_base):
    return StableDiffusionPipeline.from_pretrained(tiny_base)


@pytest.fixture
def xl(tiny_xl_base):
    return StableDiffusionXLPipeline.from_pretrained(tiny_xl_base, add_watermarker=False)


def draw(pipe, prompts=PROMPTS, seeds=SEEDS, **changes):
    options = {"steps": 3, "guidance_scale": 6.0, "eta": 1.0, "batch_size": 4, "progress": None}
    return np.stack([np.asarray(image, float) for image in generate(pipe, prompts, seeds, **options | changes)])


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_the_batch_it_is_in(pipe, scheduler):
    set_scheduler(pipe, scheduler)  # both add noise at every step, which must come from the image's own generator too
    together = draw(pipe, batch_size=4)
    alone = draw(pipe, batch_size=1)
    uneven = draw(pipe, batch_size=3)
    assert np.abs(together - alone).max() <= 1  # of 255: rounding
    assert np.abs(together - uneven).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 10, "another seed must give another image"
    assert np.abs(together[0] - together[3]).max() > 0, "another prompt must give another image"


def test_one_image_is_what_diffusers_draws_from_the_same_seed(pipe):
    set_scheduler(pipe, "ddim")
    generator = torch.Generator().manual_seed(8)
    expected = pipe(
        PROMPTS[1], num_inference_steps=3, guidance_scale=6.0, eta=1.0, generator=generator, output_type="np"
    ).images[0]
    np.testing.assert_allclose(draw(pipe)[1] / 255, expected, atol=1.5 / 255)


def test_only_ddim_uses_eta(pipe):
    set_scheduler(pipe, "ddim")
    assert np.abs(draw(pipe, eta=0.0) - draw(pipe, eta=1.0)).max() > 5
    set_scheduler(pipe, "euler")
    np.testing.assert_array_equal(draw(pipe, eta=0.0), draw(pipe, eta=1.0))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++", "euler"])
def test_schedulers_keep_the_models_noise_schedule_and_prediction_type(tiny_v_base, name):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_v_base)
    own = pipe.scheduler.alphas_cumprod.clone()
    set_scheduler(pipe, name)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, own)
    assert draw(pipe).shape == (4, 32, 32, 3)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_where_the_models_config_is_silent(pipe, name):
    silent = {key: value for key, value in EulerDiscreteScheduler().config.items() if key != "clip_sample"}
    pipe.scheduler = EulerDiscreteScheduler.from_config(silent)
    set_scheduler(pipe, name)
    assert pipe.scheduler.config.clip_sample is False


def test_base_leaves_the_models_own_scheduler(pipe):
    own = pipe.scheduler
    set_scheduler(pipe, "base")
    assert pipe.scheduler is own
    assert isinstance(own, DDIMScheduler)


def test_an_unknown_scheduler_is_refused_by_name(pipe):
    with pytest.raises(UserError, match=r"scheduler: .*'plms'.* ddim, ddpm, dpmsolver\+\+, euler, base"):
        set_scheduler(pipe, "plms")


def test_size_and_negative_prompt_reach_the_pipeline(pipe):
    assert draw(pipe, height=48, width=16).shape == (4, 48, 16, 3)
    assert np.abs(draw(pipe) - draw(pipe, negative_prompt="grass")).max() > 0


def test_sdxl_draws_the_same_in_any_batch(xl):
    set_scheduler(xl, "ddim")
    together, alone = draw(xl, batch_size=4), draw(xl, batch_size=1)
    assert together.shape == (4, 32, 32, 3)
    assert np.abs(together - alone).max() <= 1


def test_prompts_and_seeds_must_have_equal_lengths(pipe):
    with pytest.raises(ValueError, match="4 prompts for 1 seeds"):
        draw(pipe, seeds=[1])


def test_image_seeds_are_fixed_forever_and_distinct():
    # sha256 of the bytes "42 NUL cat NUL a cat NUL 0", from the sha256sum program
    assert image_seed(42, "cat", "a cat", 0) == 0x532BC2E3
    seeds = {image_seed(42, "cat", prompt, i) for prompt in ("a", "b") for i in range(50)}
    assert len(seeds) == 100
    assert image_seed(42, "ab", "c") != image_seed(42, "a", "bc")


@pytest.mark.parametrize(("option", "size"), [("height", (32, 48)), ("width", (48, 32))])
def test_one_of_height_and_width_alone_is_used(pipe, option, size):
    (image,) = generate(pipe, ["a cat"], [1], steps=1, guidance_scale=1, progress=None, **{option: 48})
    assert image.size == size


def test_more_steps_than_the_noise_schedule_has_are_refused(pipe):
    with pytest.raises(UserError, match=r"steps: 1001 .* 1000"):
        generate(pipe, ["a cat"], [1], steps=1001, guidance_scale=1, progress=None)
