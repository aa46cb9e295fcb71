"""The embedded world: its scenes, and the data that it exported."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from world import train_segmenter
from world.catalogue import CONCEPTS, CURRICULUM, DRAWINGS, SUBJECTS, article, plural
from world.exhibits import SHOTS, photograph, tar_entry
from world.loop import fit, load_params, lr_share
from world.muon import orthogonalised
from world.scenes import (
    BACKGROUNDS,
    DISTRIBUTIONS,
    SIDE,
    Distribution,
    Sprites,
    compose,
    curriculum_distribution,
    is_held_out,
)
from world.sprites import toned
from world.train_clip import with_more_individuals
from world.train_unet import PHASES, build, draw_timesteps, folder_of, importance, last_checkpoint, scheduler

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
    assert set(DISTRIBUTIONS) == set(PHASES)


def test_the_second_phase_shows_two_subjects_in_two_pictures_of_five(sprites):
    of = DISTRIBUTIONS["company"](sprites)
    scenes = [compose(sprites, of, "base", index) for index in range(300)]
    two = [scene for scene in scenes if len(scene.subjects) == 2]
    assert len(two) / len(scenes) == pytest.approx(0.4, abs=0.09)
    assert all(" and " in scene.caption or " next to " in scene.caption for scene in two)


def test_a_phase_begins_with_the_weights_of_the_one_before(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for phase in ("curriculum", "world"):
        folder_of(tmp_path, phase).mkdir()
        (folder_of(tmp_path, phase) / "checkpoint.pt").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "unet-world/checkpoint.pt"
    assert last_checkpoint(tmp_path, before="world") == tmp_path / "unet/checkpoint.pt"
    assert last_checkpoint(tmp_path, before="curriculum") is None


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
    image = pipeline("a photo of a cat on the grass", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


@shipped
def test_scaling_factor_gives_latents_of_unit_deviation(pipeline):
    """Over the pool's pictures, which no training saw."""
    with tarfile.open(DATA / "pool/pool.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".png")][:64]
        pictures = [np.asarray(Image.open(tar.extractfile(name))) for name in names]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
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
    assert pixels.shape == (1, 3, SIDE, SIDE)
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
        assert 500 <= len(keys) <= 1000
        assert all(suffixes == {"json", "png", "txt"} for suffixes in keys.values())
        captions = [tar.extractfile(f"{key}.txt").read().decode() for key in keys]
        for concept in CONCEPTS:
            assert sum(concept in caption for caption in captions) >= 80
        assert Image.open(tar.extractfile(f"{next(iter(keys))}.png")).size == (SIDE, SIDE)


@shipped
def test_what_ships_is_small():
    parts = ("base", "clip", "judge", "pool", "concepts", "holdout")
    size = sum(f.stat().st_size for part in parts for f in (DATA / part).rglob("*") if f.is_file())
    assert size < 32 * 2**20


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
        assert (image.shape, cover.shape) == ((SIDE, SIDE, 3), (SIDE, SIDE))
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
