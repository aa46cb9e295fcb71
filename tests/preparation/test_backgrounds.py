"""Views on plain backgrounds: the composite against numpy, captions, shares, and the masked loss in float64."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import noisy_images, tiny_params
from diffusers import AutoencoderKL
from PIL import Image
from scipy.ndimage import gaussian_filter

from customdiff.config import Concept
from customdiff.config.prepare import Backgrounds
from customdiff.errors import UserError
from customdiff.models import base
from customdiff.preparation import augmentation, backgrounds, prepare, prepared_set
from customdiff.preparation.examples import Example
from customdiff.preparation.masks import SubjectMask
from customdiff.preparation.views import Views
from customdiff.training.objective import losses


def disc(height=40, width=50):
    y, x = np.mgrid[:height, :width]
    return ((y - 20) ** 2 + (x - 24) ** 2 < 12**2).astype(np.float32)


def examples_of(tmp_path, colors=("red", "blue"), count=2):
    captions = {color: f"a <new1> cat on a {color} background" for color in colors}
    return [
        Example(path, "a <new1> cat", SubjectMask(disc(), "file"), captions) for path in noisy_images(tmp_path, count)
    ]


def test_the_composite_is_the_subject_over_the_color():
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    y, x = np.mgrid[:256, :256]
    coverage = ((y - 120) ** 2 + (x - 130) ** 2 < 70**2).astype(np.float32)
    found = np.asarray(backgrounds.composite(Image.fromarray(pixels), coverage, "red", np.random.default_rng(5)))
    ground = backgrounds.plain_background("red", 256, 256, np.random.default_rng(5)).astype(np.float64)
    share = gaussian_filter(coverage.astype(np.float64), 1.0)[..., None]
    exact = share * pixels + (1 - share) * ground
    # Pillow's Gaussian is made of box blurs: a little off at the edge alone
    assert np.abs(found - exact).max() < 30
    sure = (share[..., 0] < 1e-4) | (share[..., 0] > 1 - 1e-4)
    assert np.abs(found - exact)[sure].max() <= 0.55
    assert (share > 0.05).sum() > (share > 0.95).sum()
    assert np.abs(ground.mean((0, 1)) - backgrounds.COLORS["red"]).max() < 30


@pytest.mark.parametrize(
    ("template", "color", "caption"),
    [
        ("photo of a {} cat", "red", "photo of a <new1> cat on a red background"),
        ("photo of a {} cat", "orange", "photo of a <new1> cat on an orange background"),
        ("a {} cat, studio light.", "white", "a <new1> cat on a white background, studio light"),
        ("a {} cat on a grey background", "white", "photo of a <new1> cat on a white background"),
    ],
)
def test_captions_name_the_background(template, color, caption):
    values = {"source": {"path": "x"}, "modifier_token": "<new1>", "class_prompt": "cat", "instance_prompt": template}
    assert backgrounds.caption_on(color, Concept.model_validate(values)) == caption


def test_images_serve_as_backgrounds_with_their_captions(tmp_path, tiny_base):
    folder = tmp_path / "places"
    folder.mkdir()
    for name, color, caption in (("a", "navy", "at night"), ("b", "lime", "a meadow")):
        Image.new("RGB", (30, 90), color).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{caption}\n")
    settings = Backgrounds(colors=["red"], images=str(folder))
    names = backgrounds.names(settings)
    assert names == ["red", str(folder / "a.png"), str(folder / "b.png")]
    concept = tiny_params(tiny_base).concepts["cat"]
    assert [backgrounds.caption_on(name, concept) for name in names[1:]] == [
        "photo of a <new1> cat at night",
        "photo of a <new1> cat, a meadow",
    ]
    photo, coverage = Image.new("RGB", (50, 40), "red"), disc()
    found = np.asarray(backgrounds.composite(photo, coverage, names[2], np.random.default_rng(0)))
    assert found.shape == (40, 50, 3)
    np.testing.assert_array_equal(found[0, 0], (0, 255, 0))
    np.testing.assert_array_equal(found[20, 24], (255, 0, 0))

    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.png.*b\.txt"):
        backgrounds.names(settings)
    with pytest.raises(UserError, match=r"prepare\.backgrounds\.images"):
        backgrounds.names(Backgrounds(images=str(tmp_path / "nothing")))


def test_every_color_has_a_value():
    with pytest.raises(ValueError, match="colors"):
        Backgrounds(colors=["mauve"])
    assert set(Backgrounds(colors=list(backgrounds.COLORS)).colors) == set(backgrounds.COLORS)


def test_the_share_of_views_and_of_colors(tmp_path, tiny_base):
    settings = {"views": 8, "backgrounds": {"share": 0.75, "colors": ["red", "blue"]}}
    params = tiny_params(tiny_base, prepare=settings | {"augmentation": False})
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    prepared = prepare.prepare_instances(examples_of(tmp_path), params.prepare, vae, [0])
    counts = Counter(prepared.captions)
    assert counts["a <new1> cat"] == 4
    assert counts["a <new1> cat on a red background"] == counts["a <new1> cat on a blue background"] == 6
    assert prepared.mask.all()  # a plain background that the caption names is learned like the subject


def test_views_repeat_and_keep_their_own_background_bit_for_bit(tmp_path, tiny_base):
    settings = {"hflip": True, "backgrounds": {"share": 0.5, "colors": ["red", "blue"]}}
    params = tiny_params(tiny_base, prepare=settings)
    examples = examples_of(tmp_path)
    plain = [Example(example.path, example.caption) for example in examples]

    def draw(of):
        return list(Views(of, params.prepare, 4, augmentation.resized_view, 4, [7]))

    first, again, whole = draw(examples), draw(examples), draw(plain)
    for (view, caption, subject), (other, repeated, share) in zip(first, again, strict=True):
        np.testing.assert_array_equal(view.pixels, other.pixels)
        np.testing.assert_array_equal(subject, share)
        assert caption == repeated
    for (view, caption, subject), (other, _, ones) in zip(first, whole, strict=True):
        assert (view.prefix, view.framing) == (other.prefix, other.framing)
        assert np.array_equal(view.pixels, other.pixels) == (caption == "a <new1> cat")
        assert ones.all()
        assert (subject <= 1).all()
        assert (subject[~view.mask] == 0).all()


def test_the_subject_mask_follows_the_view(tmp_path, tiny_base):
    """A photo that shows its own mask: the view's pixels say where the subject is."""
    params = tiny_params(tiny_base, prepare={"hflip": True, "backgrounds": {"share": 0}})
    shown = disc()
    path = tmp_path / "000.png"
    Image.fromarray((shown * 255).astype(np.uint8)).convert("RGB").save(path)
    example = Example(path, "a <new1> cat", SubjectMask(shown, "file"))
    for view, _, subject in Views([example], params.prepare, 12, augmentation.resized_view, 4, [1]):
        exact = ((view.pixels[0].astype(np.float64) + 1) / 2).reshape(8, 4, 8, 4).mean((1, 3)) * view.mask
        np.testing.assert_allclose(subject, exact, atol=1e-6)


def test_the_masked_loss_is_a_weighted_mean():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 3, 4, 6, 6))
    valid = np.ones((3, 1, 6, 6), bool)
    valid[0, :, :2] = False
    subject = rng.uniform(size=(3, 1, 6, 6)).astype(np.float32) * valid
    subject[2] = 0  # cropped out of the view: the whole view counts
    prepared = prepared_set.PreparedSet(
        mask=torch.from_numpy(valid),
        framing=torch.zeros(3, 4, dtype=torch.int32),
        captions=["a"] * 3,
        subject=torch.from_numpy(subject),
    )
    weights = prepared_set.loss_weights(prepared, [0, 1, 2], 0.25)
    found, _ = losses(torch.from_numpy(prediction), torch.from_numpy(target), weights)
    exact = []
    for i in range(3):
        weight = np.where(valid[i], subject[i].astype(np.float64) * 0.75 + 0.25, 0) if i < 2 else np.ones((1, 6, 6))
        exact.append((((prediction[i] - target[i]) ** 2).sum(0) * weight[0]).sum() / weight.sum())
    np.testing.assert_allclose(found.item(), np.mean(exact), rtol=1e-5)
    torch.testing.assert_close(prepared_set.loss_weights(prepared, [0, 1], 1.0), prepared.mask[:2].float())
    nothing = prepared_set.loss_weights(prepared, [0, 1, 2], 0.0)
    assert (nothing.sum((1, 2, 3)) > 0).all()


def test_sets_with_and_without_masks_are_joined(tmp_path, tiny_base):
    params = tiny_params(tiny_base)
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    masked = prepare.prepare_instances(examples_of(tmp_path / "a"), params.prepare, vae, [0])
    whole = prepare.prepare_instances(
        [Example(path, "a dog") for path in noisy_images(tmp_path / "b", 1)], params.prepare, vae, [0]
    )
    assert whole.subject is None
    prepared_set.save(masked, tmp_path / "instance")
    torch.testing.assert_close(prepared_set.load(tmp_path / "instance").subject, masked.subject)
    joined = prepared_set.join([whole, masked])
    torch.testing.assert_close(joined.subject[:4], whole.mask.float())
    torch.testing.assert_close(joined.subject[4:], masked.subject)


def test_a_moved_subject_stays_whole_and_inside():
    """Of a photo that shows its own mask, the subject's pixels move with the mask."""
    shown = disc(100, 120)
    photo = Image.fromarray((shown * 255).astype(np.uint8)).convert("RGB")
    areas, centres = [], []
    for seed in range(20):
        image, coverage = backgrounds.moved(photo, shown, np.random.default_rng(seed))
        assert image.size == photo.size
        assert coverage.shape == shown.shape
        np.testing.assert_allclose(np.asarray(image)[..., 0] / 255, coverage, atol=0.01)
        areas.append(coverage.sum() / shown.sum())
        centres.append(np.argwhere(coverage > 0.5).mean(0))
        assert not coverage[[0, -1]].any()
        assert not coverage[:, [0, -1]].any()
    low, high = backgrounds.SIZES
    assert low**2 * 0.95 < min(areas) < max(areas) < high**2 * 1.05
    assert np.ptp(centres, axis=0).min() > 20
    cut = np.zeros((100, 120), np.float32)
    cut[60:, 30:90] = 1
    image, coverage = backgrounds.moved(photo, cut, np.random.default_rng(0))
    assert coverage is cut
    assert image is photo
