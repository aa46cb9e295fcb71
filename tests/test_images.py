"""Images of every mode and fault are opened as upright RGB, or refused by name; pixels are worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from customdiff import images
from customdiff.images import ImageError, limit_side, open_rgb, save


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds one byte of pixels, written without Pillow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Where the corner that is stored at the top left belongs, by the EXIF standard's table of orientations.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_rotation_puts_the_stored_corner_where_the_standard_says(orientation):
    stored = np.zeros((8, 12, 3), np.uint8)
    stored[0, 0] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_rgb(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert opened.size == ((8, 12) if orientation >= 5 else (12, 8))
    assert tuple(np.asarray(opened)[CORNERS[orientation]]) == (255, 0, 0)
    assert not opened.getexif()


def test_transparency_is_composited_on_white_in_every_mode():
    half = open_rgb(encoded(Image.new("RGBA", (2, 2), (200, 0, 0, 128)), "PNG"))
    assert np.abs(np.asarray(half)[0, 0].astype(int) - [227, 127, 127]).max() <= 1  # 128/255 red over white
    assert open_rgb(encoded(Image.new("LA", (2, 2), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 90, 80, 70])
    palette.putpixel((1, 0), 1)
    opened = open_rgb(encoded(palette, "PNG", transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (90, 80, 70)]
    keyed = open_rgb(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_and_floating_point_greys_are_scaled_not_clipped():
    grey = np.array([[0, 257 * 100, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        opened = np.asarray(open_rgb(encoded(Image.fromarray(grey), form)))
        assert opened[0, :, 0].tolist() == [0, 100, 255]
        assert (opened[..., 0] == opened[..., 2]).all()
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(open_rgb(encoded(floats, "TIFF")))[0, :, 1].tolist() == [0, 128, 255]


def test_cmyk_becomes_the_color_that_its_inks_print():
    cyan = open_rgb(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(cyan.getpixel((8, 8)), (0, 255, 255))).max() < 12  # full cyan ink takes the red away


def test_colors_of_an_embedded_profile_become_srgb():
    """By the matrices of the profile itself: one with red and blue exchanged, and one with a linear curve."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"xXYZ").replace(b"bXYZ", b"rXYZ").replace(b"xXYZ", b"bXYZ")
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))
    for form in ("PNG", "JPEG", "TIFF"):
        data = encoded(Image.new("RGB", (16, 16), (200, 100, 30)), form, icc_profile=exchanged)
        assert np.abs(np.subtract(open_rgb(data).getpixel((8, 8)), (30, 100, 200))).max() <= 4
    transparent = encoded(Image.new("RGBA", (16, 16), (200, 100, 30, 255)), "PNG", icc_profile=exchanged)
    assert np.abs(np.subtract(open_rgb(transparent).getpixel((8, 8)), (30, 100, 200))).max() <= 4
    for profile in (srgb, b"damaged", srgb[:200]):
        image = open_rgb(encoded(Image.new("RGB", (16, 16), (200, 100, 30)), "PNG", icc_profile=profile))
        assert image.getpixel((8, 8)) == (200, 100, 30)
        assert "icc_profile" not in image.info


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(form):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(open_rgb(data).getpixel((8, 8)), (250, 0, 0))).max() < 20


def test_a_decompression_bomb_is_rejected_by_its_header():
    with pytest.raises(ImageError, match=r"holiday\.png: too large: 9000 x 8000 px, above 64 megapixels"):
        open_rgb(png_header(9000, 8000), 64, name="holiday.png")
    with pytest.raises(ImageError, match="too large"):  # beyond the limit that Pillow itself has
        open_rgb(png_header(60000, 60000), 64)
    with pytest.raises(ImageError, match="too large"):
        open_rgb(encoded(Image.new("1", (1001, 1000)), "PNG"), 1)
    assert open_rgb(encoded(Image.new("1", (1000, 1000)), "PNG"), 1).size == (1000, 1000)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_file_is_refused_in_every_format(form):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), form)
    assert open_rgb(whole).size == (64, 64)
    with pytest.raises(ImageError, match=r"a\.img: "):
        open_rgb(whole[: len(whole) // 2], name="a.img")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "web page, XML or SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "export it as JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # an interpreter must never start
        (encoded(Image.new("RGB", (4, 4)), "PPM"), "of another format"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "image"),
    ],
)
def test_other_files_are_rejected_with_a_reason(data, reason, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_rgb(path)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        open_rgb(tmp_path / "gone.png")


def test_invalid_exif_is_ignored():
    data = encoded(Image.new("RGB", (16, 16), (9, 8, 7)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_rgb(data).size == (16, 16)


def test_limit_side_keeps_the_proportion_and_never_enlarges():
    assert limit_side(Image.new("RGB", (400, 100)), 200).size == (200, 50)
    small = Image.new("RGB", (40, 10))
    assert limit_side(small, 200) is small


def test_a_sheet_that_is_too_long_for_jpeg_is_scaled_down(tmp_path):
    images.save_sheet(Image.new("RGB", (8, 66_000)), tmp_path / "sheet.jpg")
    assert Image.open(tmp_path / "sheet.jpg").size == (8, 65_000)
    images.save_sheet(Image.new("RGB", (8, 9)), tmp_path / "sheet.jpg")
    assert Image.open(tmp_path / "sheet.jpg").size == (8, 9)


def test_save_is_lossless_except_for_what_came_as_jpeg(tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8))
    path = save(image, tmp_path / "0.a")
    assert path.name == "0.a.png"
    assert (np.asarray(Image.open(path)) == np.asarray(image)).all()
    path = save(image, tmp_path / "1", source=encoded(image, "JPEG"))
    assert path.name == "1.jpg"
    assert Image.open(path).format == "JPEG"
