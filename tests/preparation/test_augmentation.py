"""Each branch of the paper's augmentation, on hand-worked masks and an image whose pixels say where they came from."""

import numpy as np
import pytest
from PIL import Image

from customdiff.preparation import augmentation


class Scripted:
    """A generator that plays back what the test decides."""

    def __init__(self, uniform=(), integers=(), choice=0):
        self._uniform, self._integers, self._choice = list(uniform), list(integers), choice

    def uniform(self):
        return self._uniform.pop(0)

    def integers(self, low, high, size=None):
        value = self._integers.pop(0)
        assert np.all(np.asarray(value) >= low), (value, low)
        assert np.all(np.asarray(value) < high), (value, high)
        return value

    def choice(self, options):
        return options[self._choice]


WHITE = Image.new("RGB", (100, 100), "white")


def test_a_shrunk_view_lies_on_grey_and_its_mask_leaves_out_the_border():
    # 64 px, factor 4, scale 32 at (8, 20): latent rows 8/4+1=3 to (8+32)/4-1=9, columns 20/4+1=6 to (20+32)/4-1=12
    rng = Scripted(uniform=[0.1], integers=[32, (8, 20)], choice=1)
    view = augmentation.resized_view(WHITE, 64, 4, rng, center_crop=True)
    expected = np.zeros((16, 16), bool)
    expected[3:9, 6:12] = True
    np.testing.assert_array_equal(view.mask, expected)
    canvas = np.zeros((3, 64, 64), np.float32)
    canvas[:, 8:40, 20:52] = 1
    np.testing.assert_array_equal(view.pixels, canvas)
    assert view.prefix == "very small "


def test_the_mask_lies_wholly_on_the_image():
    """Every latent pixel in the mask covers image pixels alone, for any scale and place."""
    for seed in range(200):
        view = augmentation.resized_view(WHITE, 64, 4, np.random.default_rng(seed))
        covered = view.pixels[0].reshape(16, 4, 16, 4).min(axis=(1, 3))
        assert (covered[view.mask] == 1).all()
        assert view.mask.any()


def test_a_medium_view_has_no_prefix():
    rng = Scripted(uniform=[0.65], integers=[39, (0, 0)])
    assert augmentation.resized_view(WHITE, 64, 4, rng, center_crop=True).prefix == ""  # 39 >= 0.6 * 64


def test_an_enlarged_view_is_a_crop_and_wholly_valid():
    ramp = Image.fromarray(np.repeat(np.arange(80, dtype=np.uint8)[:, None, None], 80, 1).repeat(3, 2))
    rng = Scripted(uniform=[0.66], integers=[80, (5, 9)], choice=0)
    view = augmentation.resized_view(ramp, 64, 4, rng, center_crop=True)
    np.testing.assert_allclose((view.pixels[0] + 1) * 127.5, np.repeat(np.arange(5, 69)[:, None], 64, 1), atol=1e-4)
    assert view.mask.all()
    assert view.prefix == "zoomed in "


@pytest.mark.parametrize("size", [64, 512])
def test_scales_and_prefixes_are_drawn_as_in_the_paper(size):
    prefixes = [
        augmentation.resized_view(WHITE, size, size // 16, np.random.default_rng(seed)).prefix for seed in range(600)
    ]
    near = sum(prefix in augmentation.NEAR for prefix in prefixes) / 600
    far = sum(prefix in augmentation.FAR for prefix in prefixes) / 600
    assert near == pytest.approx(0.34, abs=0.06)
    assert far == pytest.approx(0.66 * (0.6 - 1 / 3) / (1 - 1 / 3), abs=0.06)
    assert set(prefixes) == {"", *augmentation.FAR, *augmentation.NEAR}


def test_without_augmentation_the_whole_square_is_shown():
    view = augmentation.plain_view(WHITE, 64, 4, np.random.default_rng(0))
    assert view.mask.all()
    assert (view.pixels == 1).all()
    assert view.prefix == ""


def test_the_aspect_ratio_is_preserved():
    """A disc on a wide photo stays a disc; the reference would squash it."""
    wide = Image.new("RGB", (200, 100), "black")
    wide.paste("white", (75, 25, 125, 75))
    shown = augmentation.plain_view(wide, 64, 4, np.random.default_rng(0), center_crop=True).pixels[0] > 0
    assert shown.any(0).sum() == shown.any(1).sum() == 32


def test_framing_for_sdxl():
    """A photo 100 high and 200 wide: its middle square starts at 50 px, 32 px at 64 for 100; a zoom adds its crop."""
    wide = Image.new("RGB", (200, 100))
    plain = augmentation.plain_view(wide, 64, 4, np.random.default_rng(0), center_crop=True)
    assert plain.framing == (100, 200, 0, 32)
    near = augmentation.resized_view(wide, 64, 4, Scripted(uniform=[0.9], integers=[80, (7, 11)]), center_crop=True)
    assert near.framing == (100, 200, 7, 11 + 40)
    far = augmentation.resized_view(wide, 64, 4, Scripted(uniform=[0.1], integers=[32, (8, 20)]), center_crop=True)
    assert far.framing == (100, 200, 0, 16), "the corner of the canvas is no crop"


def test_half_of_the_views_are_flipped():
    left = Image.new("RGB", (10, 10))
    left.paste("white", (0, 0, 1, 10))
    flips = [
        augmentation.flipped(left, np.random.default_rng(seed)).getpixel((0, 0)) == (0, 0, 0) for seed in range(300)
    ]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)


def test_the_same_seed_draws_the_same_view():
    first, again = (augmentation.resized_view(WHITE, 64, 4, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.prefix == again.prefix
