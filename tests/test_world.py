"""The embedded world: its scenes, and the data that it exported."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from world import train_captioner, train_identity, train_segmenter
from world.backgrounds import bank
from world.captions import named
from world.catalogue import (
    COLOURS,
    CONCEPT_HUES,
    CONCEPTS,
    CURRICULUM,
    DRAWINGS,
    INDIVIDUALS,
    SUBJECTS,
    TEXTURES,
    VARIED,
    article,
    background_phrase,
    plural,
)
from world.datasets import pictures_by_individual, rich_distribution, scene_captions, scene_masks
from world.discriminator import Discriminator, adversarial_terms, detail
from world.exhibits import SHOTS, photograph, pool_distribution, pool_scenes, tar_entry
from world.grade import image_side
from world.graders import (
    both_recognised,
    colours_right,
    distinct_colours,
    gradient_energy,
    psnr,
    subject_colours,
    zero_shot,
)
from world.individuals import (
    HUE_DISTANCE,
    Look,
    colour_word,
    dressed,
    looks,
    mean_hue,
    near_concept,
    with_colours,
    with_individuals,
    with_more_individuals,
)
from world.loop import fit, last_checkpoint, load_params, lr_share
from world.muon import orthogonalised
from world.scenes import (
    BACKGROUNDS,
    CLIP_SIDE,
    DISTRIBUTIONS,
    SIDE,
    Distribution,
    Sprites,
    compose,
    curriculum_distribution,
    is_held_out,
    to_tensor,
    varied_distribution,
)
from world.sprites import toned
from world.train_clip import pack_and_distribution, soften
from world.train_unet import (
    PHASES,
    build,
    draw_timesteps,
    folders,
    grown,
    importance,
    released_weights,
    scheduler,
)
from world.train_vae import Learner as VaeLearner
from world.train_vae import build as build_vae
from world.train_vae import grow, phase_params, sharpness_gap

DATA = Path(__file__).parent.parent / "data"
shipped = pytest.mark.skipif(not (DATA / "base/model_index.json").exists(), reason="data/base is not exported yet")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Sprites:
    """A pack of plain discs, one colour a subject: the true sources are not on a clean machine."""
    pack = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] - 47.5
    disc = np.where(x**2 + y**2 < 46**2, 255, 0).astype(np.uint8)
    for subject in SUBJECTS:
        (pack / subject).mkdir()
        colour = rng.integers(0, 255, 3)
        rgba = np.dstack([np.broadcast_to(colour, (96, 96, 3)).astype(np.uint8), disc])
        for style in ("3d render", "emoji"):
            Image.fromarray(rgba).save(pack / subject / f"{style}-one.png")
    return Sprites.load(pack)


def whole_world(**changes) -> Distribution:
    return Distribution(subjects=tuple(SUBJECTS), styles=("3d render", "emoji"), **changes)


def test_a_scene_is_a_function_of_seed_split_and_index(sprites):
    one, again = (compose(sprites, whole_world(), "base", 7) for _ in range(2))
    assert np.array_equal(one.image, again.image)
    assert one.caption == again.caption
    others = [compose(sprites, whole_world(), split, 7) for split in ("judge", "held-out", "pool")]
    others += [compose(sprites, whole_world(), "base", 8), compose(sprites, whole_world(), "base", 7, seed=1)]
    assert all(not np.array_equal(one.image, other.image) for other in others)


def test_captions_say_what_is_there(sprites):
    for i in range(300):
        scene = compose(sprites, whole_world(), "base", i)
        words = scene.caption.replace(",", "").split()
        assert scene.image.shape == (SIDE, SIDE, 3)
        for subject in scene.subjects:
            name = plural(subject) if scene.count > 1 and len(scene.subjects) == 1 else subject
            assert name in words, scene
        if scene.size == "very small":
            assert "very small" in scene.caption or "far away" in scene.caption, scene
        if scene.size == "close up":
            assert "close up" in scene.caption or "zoomed in" in scene.caption, scene


def test_sizes_are_what_captions_call_them(sprites):
    """A disc's area, found by comparing with the background, tells very small from normal from close up."""
    areas = {}
    for size, shares in {"very small": (1, 0), "close up": (0, 1), "normal": (0, 0)}.items():
        of = whole_world(very_small=shares[0], close_up=shares[1], pairs=0, counts=0, plain=1)
        scenes = [compose(sprites, of, "base", i, fixed=None) for i in range(40)]
        corner = [np.abs(s.image.astype(int) - s.image[0, 0].astype(int)).sum(axis=2) > 60 for s in scenes]
        areas[size] = np.median([c.mean() for c in corner])
    assert areas["very small"] < 0.08 < areas["normal"] < 0.7
    assert areas["very small"] < areas["normal"]


def test_curriculum_spares_the_held_out_pairs(sprites):
    of = curriculum_distribution()
    held_out = sum(is_held_out(s, b) for s in CURRICULUM for b in BACKGROUNDS)
    assert 20 < held_out < 100
    for i in range(400):
        scene = compose(sprites, of, "base", i)
        assert not is_held_out(scene.subjects[0], scene.background)


def test_fixed_scenes_show_what_was_asked_for(sprites):
    scene = compose(sprites, curriculum_distribution(), "held-out", 3, fixed=("cat", "grass"))
    assert (scene.subjects, scene.background, scene.count) == (("cat",), "grass", 1)


def test_concept_individuals_are_in_no_training():
    """No subject's pictures hold a concept's picture, neither by code point nor by drawing."""
    trained = {entry.partition("@")[0] for entries in SUBJECTS.values() for entry in entries.split()}
    drawings = {Path(path).stem for paths in DRAWINGS.values() for path in paths}
    for name, path in CONCEPTS.items():
        assert name in CURRICULUM  # the class is known through others
        assert Path(path).stem not in trained | drawings


def test_photos_differ_and_repeat():
    sprite = Image.new("RGBA", (64, 48), (120, 60, 160, 255))
    for learned, aside in SHOTS.values():
        assert len(learned) == 5
        assert len(aside) == 3
        assert len({shot.background for shot in learned + aside}) == 8
    shot = SHOTS["cat"][0][0]
    assert photograph(sprite, shot, 1).tobytes() == photograph(sprite, shot, 1).tobytes()


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_look_alike_at_both_resolutions(name):
    """At half the size, the texture of 128 px scenes has the colour and the contrast of that of 64 px ones."""
    small, large = np.stack(bank(name, 1)), np.stack(bank(name, 2))
    halved = large.reshape(len(large), 160, 2, 160, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(halved.mean(axis=(0, 1, 2)), small.mean(axis=(0, 1, 2)), atol=6)
    np.testing.assert_allclose(halved.std(axis=(1, 2)).mean(), small.std(axis=(1, 2)).mean(), rtol=0.25)


def test_masks_say_which_pixels_are_the_subjects(sprites):
    """On a plain background, and one disc: outside its mask nothing but background, inside it nothing but disc."""
    of = whole_world(plain=1, pairs=0, counts=0)
    for i in range(20):
        scene = compose(sprites, of, "base", i)
        (mask,) = scene.masks
        picture = sprites.pictures[scene.subjects[0]]["3d render"][0][1]
        disc = np.asarray(Image.frombytes("RGBA", picture.size, picture.tobytes()))[48, 48, :3].astype(int)
        background = np.asarray(COLOURS[scene.background])
        assert mask.shape == (SIDE, SIDE)
        inside = np.abs(scene.image[mask == 255] - disc).max(axis=1)
        assert np.median(inside) <= 1
        assert inside.max() < 45  # the scaling's overshoot at the edge
        assert (np.abs(scene.image[mask == 0] - background).max(axis=1) < 45).all()
        assert (mask == 255).any()


def test_what_lies_in_front_is_cut_out_of_the_mask_behind(sprites):
    of = whole_world(plain=1, pairs=1)
    scenes = [compose(sprites, of, "base", i) for i in range(100)]
    together = np.stack([scene.masks.astype(int).sum(axis=0) for scene in scenes])
    assert together.max() <= 256
    assert {len(scene.masks) for scene in scenes} == {2}


def test_captions_name_colours_that_subjects_have(sprites):
    assert [named("cherry", "red"), named("dog", "orange"), named("grapes", "green"), named("egg", None)] == [
        "a red cherry",
        "an orange dog",
        "green grapes",
        "an egg",
    ]
    coloured = with_colours(sprites)
    of = whole_world(colours=1.0)
    for i in range(200):
        scene = compose(coloured, of, "base", i)
        for subject in scene.subjects:
            word = coloured.colours.get((subject, "3d render-one"))
            if word:
                assert f"{word} {plural(subject) if len(scene.subjects) < scene.count else subject}" in scene.caption


def solid(*rgb: int) -> Image.Image:
    return Image.new("RGBA", (8, 8), (*rgb, 255))


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((200, 30, 30), "red"),
        ((240, 140, 30), "orange"),
        ((245, 220, 50), "yellow"),
        ((50, 160, 60), "green"),
        ((40, 90, 210), "blue"),
        ((120, 60, 190), "purple"),
        ((240, 120, 190), "pink"),
        ((100, 60, 30), "brown"),
        ((245, 245, 240), "white"),
        ((128, 128, 128), "grey"),
        ((25, 25, 28), "black"),
    ],
)
def test_colours_have_names(rgb, word):
    assert colour_word(solid(*rgb)) == word


def test_a_picture_of_two_colours_has_no_name():
    picture = solid(220, 20, 20)
    picture.paste((20, 20, 220, 255), (0, 0, 4, 8))
    assert colour_word(picture) is None


def test_individuals_stay_away_from_the_concepts():
    """The hue of every dressed orange picture that is allowed for a cat, by colorsys, is far from the concept's."""
    import colorsys

    allowed = 0
    for look in looks("cat", 60):
        other = dressed(solid(230, 140, 60), look)
        r, g, b = (value / 255 for value in np.asarray(other).reshape(-1, 4)[:, :3].mean(axis=0))
        hue, saturation, _ = colorsys.rgb_to_hsv(r, g, b)
        distance = abs((360 * hue - CONCEPT_HUES["cat"] + 180) % 360 - 180)
        if not near_concept("cat", other):
            allowed += 1
            assert saturation < 0.3 or distance > HUE_DISTANCE - 6
    assert 30 < allowed < 60
    assert near_concept("cat", dressed(solid(230, 140, 60), Look(hue=230)))
    assert not near_concept("dog", dressed(solid(230, 140, 60), Look(hue=230)))


def test_mean_hue_of_what_is_seen():
    picture = solid(200, 0, 0)
    picture.paste((0, 0, 255, 0), (0, 0, 8, 6))  # transparent: not seen
    hue, coherence, chroma, value = mean_hue(picture)
    assert min(hue, 360 - hue) < 1
    assert (coherence, chroma, value) == pytest.approx((1, 200 / 255, 200 / 255), abs=1e-3)


def test_individuals_kept_aside_are_in_no_training(sprites):
    trained = with_individuals(sprites, {"dog": 20}).pictures["dog"]["3d render"]
    aside = with_individuals(sprites, {"dog": 20}, aside=True).pictures["dog"]["3d render"]
    assert len(aside) == 4
    assert len(trained) == 1 + 16
    assert not {name for name, _ in trained} & {name for name, _ in aside}
    assert with_individuals(sprites, {"dog": 20}).pictures["car"] == sprites.pictures["car"]
    plain = with_individuals(sprites, {"dog": 20}, colour_only=True).pictures["dog"]["3d render"]
    assert {picture.size for _, picture in plain} == {trained[0][1].size}
    assert {picture.size for _, picture in trained} != {trained[0][1].size}
    assert not any("striped" in name or "spotted" in name for name, _ in plain)


def test_a_softened_image_loses_only_its_finest_detail():
    image = torch.zeros(3, 64, 64)
    image[:, :, 32:] = 1
    checkered = (torch.arange(64) % 2).float().expand(3, 64, 64)
    torch.manual_seed(0)
    first, second, third, fourth = soften(torch.stack([image, checkered, image, checkered]), 0.5)
    assert torch.equal(third, image)
    assert torch.equal(fourth, checkered)
    assert (first - image).abs().mean() < 0.02
    assert second.std() < 0.8 * checkered.std()
    assert torch.equal(soften(image[None], 0.0), image[None])


def test_the_judge_knows_many_individuals_of_every_subject(sprites, tmp_path):
    for subject, styles in sprites.pictures.items():
        (tmp_path / "sprites" / subject).mkdir(parents=True)
        for found in styles.values():
            for name, picture in found:
                picture.convert("RGBA").save(tmp_path / "sprites" / subject / f"{name}.png")
    many, of = pack_and_distribution(tmp_path, "judge", individuals=6)
    few, _ = pack_and_distribution(tmp_path, "clip", individuals=6)
    for subject, styles in few.pictures.items():
        for style, found in styles.items():
            assert len(many.pictures[subject][style]) >= 4 * len(found)
    assert of.mirrored
    assert set(of.subjects) == set(few.pictures)


def test_the_fourth_phase_shows_more_pairs_and_more_very_small_subjects(sprites):
    of = DISTRIBUTIONS["busy"](sprites)
    scenes = [compose(sprites, of, "base", i) for i in range(300)]
    assert np.mean([len(scene.subjects) == 2 for scene in scenes]) == pytest.approx(0.36, abs=0.09)
    assert np.mean([scene.size == "very small" for scene in scenes]) == pytest.approx(0.61 * 0.26, abs=0.07)


def test_the_fifth_phase_names_the_colours_of_most_pairs(sprites):
    pictures = {subject: styles["3d render"] for subject, styles in sprites.pictures.items() if subject in VARIED}
    colours = {(subject, name): "blue" for subject, found in pictures.items() for name, _ in found}
    coloured = dataclasses.replace(sprites, colours=colours)
    scenes = [compose(coloured, DISTRIBUTIONS["coloured"](coloured), "base", i) for i in range(300)]
    pairs = [scene for scene in scenes if len(scene.subjects) == 2]
    assert len(pairs) / 300 == pytest.approx(0.45, abs=0.09)
    named = [sum(f"blue {subject}" in scene.caption for subject in scene.subjects) for scene in pairs]
    assert np.mean(named) == pytest.approx(2 * 0.85, abs=0.2)


def test_the_gap_of_sharpness_is_that_of_the_deviations_of_gradients_in_each_patch():
    out, image = np.random.default_rng(2).normal(size=(2, 1, 1, 17, 17))

    def deviations(differences):  # of 8 x 8 values, the rest at the edges left out
        rows, columns = (size // 8 for size in differences.shape)
        return np.array([
            differences[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].std() for i in range(rows) for j in range(columns)
        ])  # fmt: skip

    expected = sum(
        np.abs(deviations(np.diff(out[0, 0], axis=axis)) - deviations(np.diff(image[0, 0], axis=axis))).mean()
        for axis in (0, 1)
    )
    assert sharpness_gap(torch.tensor(out), torch.tensor(image)).item() == pytest.approx(expected, rel=1e-9)
    assert sharpness_gap(torch.tensor(image), torch.tensor(image)) == 0


def test_the_third_phase_knows_twice_the_subjects(sprites):
    assert len(set(VARIED)) == len(VARIED) >= 60
    assert set(CURRICULUM) <= set(VARIED) <= set(SUBJECTS)
    assert set(INDIVIDUALS) <= set(VARIED) == set(varied_distribution().subjects)
    for i in range(200):
        scene = compose(sprites, varied_distribution(), "base", i)
        assert not is_held_out(scene.subjects[0], scene.background)


def test_the_pool_shows_each_subject_often_enough(sprites):
    of = pool_distribution()
    wanted = dict.fromkeys(of.subjects, 3) | {"cat": 9}
    scenes = list(pool_scenes(sprites, of, wanted))
    shown = {subject: sum(subject in scene.subjects for scene in scenes) for subject in of.subjects}
    assert all(shown[subject] >= number for subject, number in wanted.items())
    assert len(scenes) <= sum(wanted.values())


def test_labelled_scenes(sprites):
    masks = scene_masks(sprites, rich_distribution(), "base", 20)
    assert masks["images"].shape == (20, SIDE, SIDE, 3)
    assert len(masks["masks"]) == len(masks["image"]) == len(masks["prompts"]) >= 20
    assert set(masks["prompts"]) <= set(VARIED)
    captions = scene_captions(sprites, rich_distribution(), "base", 20)
    assert np.array_equal(masks["images"], captions["images"])
    for caption, facts in zip(captions["captions"], captions["facts"], strict=True):
        assert json.loads(facts)["subjects"][0].rstrip("y") in caption  # cherries
    many = pictures_by_individual(sprites, "3d render", each=3, seed=0)
    assert len(many["images"]) == len(many["individual"]) == 3 * len(many["names"])
    assert many["names"][many["individual"][4]].startswith(f"{many['classes'][1]}/")
    assert not np.array_equal(many["images"][0], many["images"][1])


def test_a_grown_autoencoder_decodes_as_the_smaller_one():
    """Up to the last level, whose pictures are twice as wide, every channel is there twice with the same values."""
    torch.manual_seed(0)
    smaller = build_vae({"widths": [16, 32, 64], "layers": 1, "norm_groups": 8}).eval()
    vae = build_vae({"widths": [16, 32, 64, 128], "layers": 1, "norm_groups": 8})
    grow(vae, smaller, noise=0.0)
    latents = torch.randn(1, 4, 16, 16)

    def inner(model, levels: int) -> torch.Tensor:
        hidden = model.decoder.mid_block(model.decoder.conv_in(model.post_quant_conv(latents)))
        for block in model.decoder.up_blocks[:levels]:
            hidden = block(hidden)
        return hidden

    with torch.no_grad():
        ours, theirs = inner(vae, 2), inner(smaller, 2)
        torch.testing.assert_close(ours, theirs.repeat_interleave(2, dim=1), atol=1e-3, rtol=1e-3)
        large, small = vae.decode(latents).sample, smaller.decode(latents).sample
    assert large.shape == (1, 3, SIDE, SIDE)
    # the last two convolutions see enlarged pixels: alike, not equal
    correlation = np.corrcoef(torch.nn.functional.avg_pool2d(large, 2).flatten(), small.flatten())[0, 1]
    assert correlation > 0.8


@pytest.mark.parametrize(("phase", "learned"), [("sharpened", set()), ("crisp", {"discriminator"})])
def test_phases_after_refined_leave_the_latents_alone(phase, learned):
    params = phase_params(phase) | {"features": 0}
    learner = VaeLearner(build_vae(params), params)
    learner.freeze_encoder()
    latents = learner.vae.encode(torch.zeros(1, 3, SIDE, SIDE)).latent_dist.mean
    assert not latents.requires_grad
    learner(torch.rand(1, 3, SIDE, SIDE))["loss"].backward()
    trained = {name.split(".")[0] for name, p in learner.vae.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "post_quant_conv"}
    assert {name.split(".")[0] for name, p in learner.named_parameters() if p.grad is not None} == {"vae"} | learned


def test_later_phases_change_only_what_their_section_says():
    first, refined = phase_params("vae"), phase_params("refined")
    assert {key for key in refined if refined[key] != first[key]} <= set(load_params("refined"))
    assert refined["widths"] == first["widths"]


def test_a_grown_unet_predicts_as_the_smaller_one():
    """One layer more in the lowest level; and a step of training moves the new layers."""
    params = {"widths": [8, 16], "heads": 2, "norm_groups": 4}
    torch.manual_seed(3)
    small, large = build(params | {"layers": 1}, 12), build(params | {"layers": [1, 2]}, 12)
    weights = grown(small.state_dict(), large)
    large.load_state_dict(weights)
    noisy, t, text = torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.randn(2, 5, 12)
    with torch.no_grad():
        expected, found = (unet(noisy, t, encoder_hidden_states=text).sample for unet in (small, large))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in large.parameters()) > 1.2 * sum(p.numel() for p in small.parameters())
    large(noisy, t, encoder_hidden_states=text).sample.square().mean().backward()
    for block in ("down_blocks.1.resnets.1.conv2", "up_blocks.0.resnets.0.conv2", "up_blocks.0.attentions.0.proj_out"):
        assert large.get_parameter(f"{block}.weight").grad.abs().max() > 0
    again = grown(large.state_dict(), large)
    assert all(torch.equal(again[key], value) for key, value in large.state_dict().items())


def test_adversarial_terms_move_one_side_each():
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    images, out = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    rebuilt = (out - images).square().mean()
    fool, tell = adversarial_terms(discriminator, out, images, rebuilt, noise=0.1)
    (moved,) = torch.autograd.grad(fool, out, retain_graph=True)
    (reconstruction,) = torch.autograd.grad(rebuilt, out, retain_graph=True)
    assert moved.norm() == pytest.approx(float(reconstruction.norm()), rel=1e-4)
    before = discriminator(detail(out, noise=0)).mean()
    after = discriminator(detail(out - 1e-1 * moved / moved.norm(), noise=0)).mean()
    assert after > before  # a step towards looking real
    torch.testing.assert_close(detail(out + 0.3, noise=0), detail(out, noise=0))  # blind to a cast
    assert all(g is None for g in torch.autograd.grad(fool, list(discriminator.parameters()), allow_unused=True))
    tell.backward()
    assert out.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_sharpness_and_psnr_by_hand():
    x = torch.zeros(1, 3, 4, 4)
    x[..., 2:] = 1.0  # one edge of height 1 in every row: 4 of its 12 differences across, none of those down
    assert gradient_energy(x) == pytest.approx(1 / 3)
    assert gradient_energy(0.5 * x) == pytest.approx(1 / 12)
    assert psnr(x, x + 0.2) == pytest.approx(20)  # a peak of 2, an error of 0.2


class WordEmbedder:
    """A judge that hears words alone: an embedding has a 1 for each word; a picture is a number in `captions`."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions
        self.words = sorted({word for caption in captions for word in caption.split()} | set(SUBJECTS))

    def text(self, captions: list[str]) -> torch.Tensor:
        rows = torch.tensor([[float(word in caption.split()) for word in self.words] for caption in captions])
        return torch.nn.functional.normalize(rows, dim=-1)

    def image(self, images: list[np.ndarray]) -> torch.Tensor:
        return self.text([self.captions[int(image)] for image in images])


def test_both_subjects_must_be_recognised():
    """In halves that are of one colour each, and a judge that reads that colour as a caption's number."""
    captions = ["a photo of a cat", "a photo of a dog", "a photo of an egg"]

    class ColourEmbedder(WordEmbedder):
        def image(self, images: list[np.ndarray]) -> torch.Tensor:
            assert all(len(np.unique(image)) == 1 and image.shape[0] == image.shape[1] for image in images)
            return self.text([self.captions[image[0, 0, 0]] for image in images])

    def picture(left: int, right: int) -> np.ndarray:
        image = np.full((128, 128, 3), left, np.uint8)
        image[:, 64:] = right
        return image

    pictures = [picture(0, 1), picture(1, 0), picture(0, 0), picture(0, 2)]
    facts = [("cat", "dog", "snow")] * 4
    assert both_recognised(ColourEmbedder(captions), pictures, facts, ("cat", "dog", "egg")) == 0.5


def test_zero_shot_names_subject_and_background():
    captions = ["a photo of a cat in the snow", "a photo of an egg on the grass", "a photo of a dog on the sand"]
    found = zero_shot(
        WordEmbedder(captions),
        [np.array(0), np.array(1), np.array(2)],
        [("cat", "snow"), ("egg", "sand"), ("cat", "sand")],
        ("cat", "dog", "egg"),
    )
    assert found == {"subject": pytest.approx(2 / 3), "background": pytest.approx(2 / 3)}


def test_a_colour_is_right_where_its_half_has_it():
    def picture(left, right) -> np.ndarray:
        image = np.full((32, 64, 3), 240, np.uint8)
        image[10:22, 10:22] = left
        image[10:22, 42:54] = right
        return image

    red, blue = (200, 40, 40), (40, 60, 200)
    pictures = [picture(red, blue), picture(blue, red), picture(red, red), picture(red, (240, 240, 240))]
    assert colours_right(pictures, [("red", "blue")] * 4) == 4 / 8


def test_distinct_colours_of_subjects():
    pictures = []
    for rgb in ((200, 40, 40), (190, 50, 40), (40, 60, 200), (50, 60, 190), (40, 200, 40)):
        picture = np.full((32, 32, 3), 240, np.uint8)
        picture[10:22, 10:22] = rgb
        pictures.append(picture)
    colours = subject_colours(pictures)
    np.testing.assert_allclose(colours[2], (40, 60, 200), atol=1)
    assert distinct_colours(colours) == 2  # the green one is alone
    assert distinct_colours(colours, at_least=1) == 3


@pytest.mark.parametrize(
    ("name", "many"), [("cherry", "cherries"), ("fish", "fish"), ("bus", "buses"), ("key", "keys")]
)
def test_plurals(name, many):
    assert plural(name) == many


def test_articles():
    assert [article(name) for name in ("apple", "unicorn", "cat")] == ["an apple", "a unicorn", "a cat"]


def test_subjects_are_enough_and_the_curriculum_is_of_them():
    assert len(SUBJECTS) >= 80
    assert set(CURRICULUM) <= set(SUBJECTS)
    assert set(DRAWINGS) <= set(SUBJECTS)
    assert set(PHASES) <= set(DISTRIBUTIONS)


def test_the_second_phase_shows_two_subjects_in_two_pictures_of_five(sprites):
    of = DISTRIBUTIONS["company"](sprites)
    scenes = [compose(sprites, of, "base", index) for index in range(300)]
    two = [scene for scene in scenes if len(scene.subjects) == 2]
    assert len(two) / len(scenes) == pytest.approx(0.4, abs=0.09)
    assert all(" and " in scene.caption or " next to " in scene.caption for scene in two)


def test_the_last_checkpoint_is_that_of_the_last_phase_that_has_one(tmp_path):
    phases = folders(tmp_path)
    assert last_checkpoint(phases.values()) is None
    for phase in ("curriculum", "busy"):
        phases[phase].mkdir()
        (phases[phase] / "checkpoint.pt").touch()
    assert last_checkpoint(phases.values()) == tmp_path / "unet-busy/checkpoint.pt"
    assert last_checkpoint([phases["curriculum"], phases["company"]]) == tmp_path / "unet-curriculum/checkpoint.pt"


def test_the_released_unet_is_the_mean_of_two_phases_once_both_are_trained(tmp_path):
    averaged = load_params("unet")["averaged"]
    for number, phase in enumerate(averaged):
        folder = folders(tmp_path)[phase]
        folder.mkdir()
        torch.save({"ema": {"weight": torch.full((2,), 4.0 * number)}}, folder / "checkpoint.pt")
        expected = torch.full((2,), 2.0 * number)  # of the first alone, then of both
        torch.testing.assert_close(released_weights(tmp_path, averaged)["weight"], expected)
    assert len(averaged) == 2


def test_tar_entries_are_the_same_everywhere():
    def pack() -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            tar.addfile(*tar_entry("000000.txt", b"a cat"))
        return file.getvalue()

    assert pack() == pack()
    with tarfile.open(fileobj=io.BytesIO(pack())) as tar:
        assert tar.getmembers()[0].mtime == 0


def test_importance_keeps_the_expected_loss():
    """Drawing by importance and weighing by what remains gives the min-SNR mean of any function of t."""
    alphas = scheduler().alphas_cumprod.double()
    density, weights = importance(alphas, 5.0)
    value = torch.linspace(2, 3, 1000, dtype=torch.float64) ** 2
    snr = alphas / (1 - alphas)
    expected = (snr.clamp(max=5) / (snr + 1) * value).mean()
    assert torch.isclose((density * weights * value).sum(), expected)
    torch.manual_seed(0)
    t = draw_timesteps(density, 40_000)
    assert torch.isclose((weights[t] * value[t]).mean(), expected, rtol=1e-2)


def test_orthogonalised_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = np.linalg.svd(orthogonalised(torch.randn(shape)).numpy(), compute_uv=False)
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_learning_rate_warms_up_and_falls_to_zero():
    assert lr_share(0.0, 0, 100) == pytest.approx(0.01)
    assert lr_share(0.5, 5000, 100) == 1
    assert lr_share(0.825, 5000, 100) == pytest.approx(0.5)
    assert lr_share(1.0, 5000, 100) == 0


@pytest.mark.parametrize("muon", [False, True])
def test_a_training_goes_on_where_it_stopped(tmp_path, muon):
    """Weights, optimizer, step number and clock come back: the second run starts where the first one ended."""
    seen: list[int] = []

    def train(minutes: float) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_at(step: int) -> dict[str, torch.Tensor]:
            seen.append(step)
            return {"loss": (model(torch.ones(2, 4)) - 1).square().mean()}

        fit(tmp_path / "run", model, loss_at, minutes=minutes, peak_lr=1e-2, muon=muon)
        return model

    first = train(0.002)
    stopped = len(seen)
    again = train(0.002)  # its minutes are used up: nothing happens but loading
    assert len(seen) == stopped
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    train(0.004)
    assert len(seen) > stopped
    assert seen == list(range(len(seen)))


def test_heads_must_divide_every_width():
    params = {"widths": [16, 24], "heads": 16, "layers": 1, "norm_groups": 8}
    with pytest.raises(ValueError, match=r"unet\.heads 16 must divide"):
        build(params, 32)


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(DATA / "base")


@shipped
def test_base_is_a_stable_diffusion_pipeline(pipeline):
    index = json.loads((DATA / "base/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["requires_safety_checker"] is False
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert all(
        width % pipeline.unet.config.attention_head_dim == 0 for width in pipeline.unet.config.block_out_channels
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a cat on the grass", num_inference_steps=2).images[0]
    assert image.size == (image_side(pipeline),) * 2


@shipped
def test_scaling_factor_gives_latents_of_unit_deviation(pipeline):
    """Over the pool's pictures, which no training saw."""
    with tarfile.open(DATA / "pool/pool.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith((".jpg", ".png"))][:64]
        pictures = [np.asarray(Image.open(tar.extractfile(name))) for name in names]
    x = to_tensor(pictures, image_side(pipeline))
    with torch.no_grad():
        latents = pipeline.vae.encode(x).latent_dist.mean
        out = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    assert 0.85 < float(latents.std() * pipeline.vae.config.scaling_factor) < 1.15
    assert float((10 * torch.log10(4 / (out - x).square().mean(dim=(1, 2, 3)))).mean()) > 21


@shipped
@pytest.mark.parametrize("folder", ["base/tokenizer", "clip", "judge"])
def test_tokenizer_round_trip_and_new_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / folder)
    caption = "a very small photo of a cat far away on a yellow background"
    ids = tokenizer(caption, padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 24
    assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert len(tokenizer.tokenize(caption)) == len(caption.split())  # every word of the world is one token
    assert tokenizer.eos_token_id != 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.add_tokens("<new1>") == 1
    assert "<new1>" in tokenizer.tokenize("photo of a <new1> cat")


@shipped
@pytest.mark.parametrize("folder", ["clip", "judge"])
def test_every_word_counts_in_the_text_embedding(folder):
    """Pooled at the end token, also behind other words and with a token added: a changed word changes the embedding."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(DATA / folder)
    model = CLIPTextModelWithProjection.from_pretrained(DATA / folder, dtype=torch.float32).eval()
    tokenizer.add_tokens("<new1>")
    model.resize_token_embeddings(len(tokenizer))
    captions = ["photo of a <new1> cat on red", "photo of a <new1> cat on blue", "photo of a <new1> dog on red"]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        embeddings = model(tokens.input_ids).text_embeds
        masked = model(**tokens).text_embeds
    assert torch.allclose(embeddings, masked, atol=1e-4)  # padding changes nothing
    difference = torch.cdist(embeddings, embeddings) / embeddings.norm(dim=1).mean()
    assert difference[0, 1] > 0.05
    assert difference[0, 2] > 0.05


@shipped
def test_text_encoder_is_the_clips_own(pipeline):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(DATA / "clip", dtype=torch.float32).eval()
    tokens = torch.tensor([pipeline.tokenizer("a dog on the sand").input_ids])
    with torch.no_grad():
        ours = pipeline.text_encoder(tokens).last_hidden_state
        theirs = clip.text_model(tokens).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-3)


@shipped
def test_image_processor_loads_without_torchvision():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(DATA / "clip")
    white = Image.new("RGB", (256, 256), (255, 255, 255))
    pixels = processor(images=white, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, CLIP_SIDE, CLIP_SIDE)
    assert torch.allclose(pixels, torch.ones_like(pixels), atol=1e-5)


@shipped
def test_pool_is_a_well_formed_webdataset():
    with tarfile.open(DATA / "pool/pool.tar") as tar:
        members = tar.getmembers()
        assert {member.mtime for member in members} == {0}
        keys: dict[str, set[str]] = {}
        for member in members:
            stem, _, suffix = member.name.partition(".")
            keys.setdefault(stem, set()).add(suffix)
        assert 800 <= len(keys) <= 1400
        assert all(suffixes == {"jpg", "txt"} for suffixes in keys.values())
        facts = json.loads((DATA / "pool/facts.json").read_text())
        assert set(facts) == set(keys)
        for subject in VARIED:
            shown = sum(subject in fact["subjects"] for fact in facts.values())
            assert shown >= (60 if subject in CONCEPTS else 20)
        assert Image.open(tar.extractfile(f"{next(iter(keys))}.jpg")).size == (SIDE, SIDE)


@shipped
def test_what_ships_is_small():
    parts = ("base", "captioner", "clip", "judge", "pool", "concepts", "holdout", "identity", "segmenter")
    files = [f for part in parts for f in (DATA / part).rglob("*") if f.is_file() and not f.is_symlink()]
    assert sum(f.stat().st_size for f in files) < 36 * 2**20


def test_more_individuals_by_hue_and_tone(sprites):
    """Of the subjects named, each picture once a change; one whose hue was turned already is toned alone."""
    cats = sprites.pictures["cat"]
    turned_already = Sprites({"cat": {"3d render": [*cats["3d render"], ("3d render-one@45", cats["emoji"][0][1])]}})
    more = with_more_individuals(turned_already, {"cat": [90, "white", "dark"]}).pictures["cat"]["3d render"]
    assert [name for name, _ in more] == [
        "3d render-one",
        "3d render-one@45",
        "3d render-one@90",
        "3d render-one@white",
        "3d render-one@dark",
        "3d render-one@45@white",
        "3d render-one@45@dark",
    ]
    assert with_more_individuals(sprites, {}).pictures == sprites.pictures


def test_tones_by_hand():
    """(204, 102, 51) has hue 20 degrees, saturation 0.75 and value 0.8."""
    picture = Image.new("RGBA", (2, 2), (204, 102, 51, 77))
    expected = {
        "white": (0.8 + 0.16) * 255 * np.array([1, 1 - 0.075 * 2 / 3, 1 - 0.075]),
        "grey": np.full(3, (0.64 + 0.05) * 255),
        "dark": 0.28 * 255 * np.array([1, 1 - 0.375 * 2 / 3, 1 - 0.375]),
    }
    for tone, colour in expected.items():
        found = np.asarray(toned(picture, tone))[0, 0]
        np.testing.assert_allclose(found[:3], colour, atol=2.5)
        assert found[3] == 77


def test_a_segmenters_scene_shows_what_its_mask_says(sprites):
    """The discs of the fixture have one color each: inside the mask there is that color alone."""
    for index in range(20):
        image, cover = train_segmenter.scene(sprites, index)
        again, _ = train_segmenter.scene(sprites, index)
        assert np.array_equal(image, again)
        side = train_segmenter.SIDE
        assert (image.shape, cover.shape) == ((side, side, 3), (side, side))
        assert 0 <= cover.min() <= cover.max() <= 1
        assert image[cover == 1].astype(float).std(axis=0).max() < 60
    params = load_params("segmenter") | {"unseen_subjects": ["snail"], "unseen_colours": ["dark"]}
    learned, recoloured, unseen = train_segmenter.split_individuals(sprites, params)
    assert "snail" not in learned.pictures
    assert set(unseen.pictures) == {"snail"}
    names = {name for found in learned.pictures["cat"].values() for name, _ in found}
    assert not any(name in names for found in recoloured.pictures["cat"].values() for name, _ in found)


@pytest.mark.skipif(not (DATA / "segmenter/config.json").exists(), reason="data/segmenter is not exported yet")
def test_the_segmenter_finds_the_example_concepts():
    """On the photos of the example concepts, which no training saw, its area grows with the subject."""
    from customdiff.preparation.masks import problem_of
    from customdiff.preparation.segmenter import Segmenter

    segmenter = Segmenter(str(DATA / "segmenter"), torch.device("cpu"))
    for name in CONCEPTS:
        paths = sorted((DATA / "concepts" / name).glob("*.png"))
        images = [Image.open(path).convert("RGB") for path in paths]
        scales = []
        for shot, found in zip(SHOTS[name][0], segmenter.masks(images, name), strict=True):
            assert problem_of(found) == ""
            scales.append(found.mean() ** 0.5 / shot.share)
        assert np.std(scales) / np.mean(scales) < 0.1


@shipped
def test_a_captioners_caption_says_what_the_scene_shows(sprites):
    tokenizer = CLIPTokenizer.from_pretrained(DATA / "clip")
    of = train_captioner.distribution(sprites)
    photos = [train_captioner.photo(sprites, of, index, told_share=0.5) for index in range(24)]
    images, ids, labels = train_captioner.batch_of(photos, tokenizer)
    assert images.shape == (24, 3, CLIP_SIDE, CLIP_SIDE)
    for index, (_, first, rest, is_true) in enumerate(photos):
        scene = compose(sprites, of, "base", index)
        assert rest.endswith(background_phrase(scene.background))
        learned = tokenizer.decode(ids[index][labels[index] >= 0], skip_special_tokens=True).strip()
        assert learned == ((first + rest) if is_true else rest).strip()
        if is_true:
            assert any(word in first for word in (scene.subjects[0], plural(scene.subjects[0])))
    assert {is_true for *_, is_true in photos} == {True, False}


@shipped
def test_the_captioner_names_the_backgrounds_of_the_example_concepts():
    from customdiff.preparation.captioner import Captioner

    captioner = Captioner(str(DATA / "captioner"), torch.device("cpu"))
    for name, (shots, holdout) in SHOTS.items():
        for folder, part in (("concepts", shots), ("holdout", holdout)):
            paths = sorted((DATA / folder / name).glob("*.png"))
            found = captioner.captions([Image.open(path).convert("RGB") for path in paths], name)
            assert found == [f"photo of a {name} {background_phrase(shot.background)}" for shot in part]


def test_the_contrastive_loss_is_that_of_the_paper():
    """Equation 2 of Khosla et al. 2020, summed by hand in float64."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.array([0, 0, 1, 1, 1, 2])[:5]
    features, temperature = features[:5], 0.3
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        shares = {j: np.exp(features[i] @ features[j] / temperature) for j in others}
        own = [j for j in others if labels[j] == labels[i]]
        total -= np.mean([np.log(shares[j] / sum(shares.values())) for j in own])
    found = train_identity.contrastive_loss(torch.from_numpy(features), torch.from_numpy(labels), temperature)
    assert float(found["loss"]) == pytest.approx(total / 5, rel=1e-9)


def test_a_batch_has_several_individuals_of_a_class_and_several_photos_of_each(sprites):
    everyone = train_identity.all_individuals(sprites, hues=6)
    params = {"classes": 2, "individuals": 3, "photos": 2}
    pack = {subject: groups for subject, groups in everyone.items() if sum(map(len, groups)) >= 3}
    images, labels = train_identity.batch_at(0, pack, params)
    assert len(images) == len(labels) == 12
    assert sorted(labels) == sorted([*range(6)] * 2)
    assert all(image.shape == (CLIP_SIDE, CLIP_SIDE, 3) for image in images)


@shipped
def test_the_identity_encoder_prefers_the_example_to_another_individual_of_its_class(sprites):
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(DATA / "identity", dtype=torch.float32).eval()

    def features(paths):
        images = [np.asarray(Image.open(path).convert("RGB").resize((CLIP_SIDE, CLIP_SIDE))) for path in paths]
        return train_identity.features_of(model, images)

    for name in CONCEPTS:
        photos = features(sorted((DATA / "concepts" / name).glob("*.png")))
        holdout = features(sorted((DATA / "holdout" / name).glob("*.png")))
        with tarfile.open(DATA / "pool/pool.tar") as tar:
            facts = json.loads((DATA / "pool/facts.json").read_text())
            keys = [key for key, fact in facts.items() if fact["subjects"] == [name]][:10]
            others = features([tar.extractfile(f"{key}.jpg") for key in keys])
        assert (holdout @ photos.T).mean(axis=1).min() > (others @ photos.T).mean(axis=1).max()
