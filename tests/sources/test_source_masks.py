"""Masks that come with photos: alpha channels and files beside them, scaled with the photo, never counted as photos."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

from customdiff import images
from customdiff.config import Download, Source
from customdiff.sources import instance_images
from customdiff.sources.masks import stored_masks

LIMITS = Download(minimum=2, maximum=10, max_side=100)


def bytes_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blob(size=(80, 60)):
    mask = Image.new("L", size)
    mask.paste(255, (20, 10, 50, 40))
    return mask


def photo(seed, size=(80, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def collect(tmp_path, members):
    (tmp_path / "in").mkdir()
    for name, data in members.items():
        (tmp_path / "in" / name).write_bytes(data)
    return instance_images.collect("cat", Source(path=str(tmp_path / "in")), LIMITS, tmp_path / "out")


def test_alpha_and_mask_files_are_kept_beside_the_photos(tmp_path):
    transparent = photo(0)
    transparent.putalpha(blob())
    large = blob((160, 120))
    members = {
        "a.png": bytes_of(transparent),
        "b.jpg": bytes_of(photo(1), "JPEG"),
        "b.jpg.mask.png": bytes_of(blob()),
        "c.png": bytes_of(photo(2, (160, 120))),
        "c.mask.png": bytes_of(large),
        "d.png": bytes_of(photo(3).convert("RGBA")),  # opaque
        "e.mask.png": bytes_of(blob()),  # of no photo
    }
    result = collect(tmp_path, members)
    out = tmp_path / "out"
    assert [entry["source"] for entry in result.kept] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert [path.name for path in instance_images.instance_paths(out)] == ["000.png", "001.png", "002.png", "003.png"]
    assert {name: origin for name, (_, origin) in stored_masks(out).items()} == {
        "000.png": "alpha",
        "001.png": "file",
        "002.png": "file",
    }
    for name in ("000", "001"):
        np.testing.assert_array_equal(Image.open(out / f"{name}.mask.png"), blob())
    assert Image.open(out / "002.mask.png").size == Image.open(out / "002.png").size == (100, 75)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry.get("mask_from") for entry in manifest["images"]] == ["alpha", "file", "file", None]
    # the photo itself is laid on white, as before
    assert np.asarray(Image.open(out / "000.png"))[0, 0].tolist() == [255, 255, 255]


def test_a_mask_file_comes_before_the_alpha_channel(tmp_path):
    corners = photo(0)
    corners.putalpha(Image.new("L", corners.size, 255))
    corners.putpixel((0, 0), (0, 0, 0, 0))  # as in a screenshot with rounded corners
    collect(tmp_path, {"a.png": bytes_of(corners), "a.mask.png": bytes_of(blob()), "b.png": bytes_of(photo(1))})
    path, origin = stored_masks(tmp_path / "out")["000.png"]
    assert origin == "file"
    np.testing.assert_array_equal(Image.open(path), blob())


def test_a_turned_photo_has_its_alpha_turned(tmp_path):
    transparent = photo(0)
    transparent.putalpha(blob())
    exif = Image.Exif()
    exif[0x0112] = 6
    found = images.alpha_of(bytes_of(transparent, exif=exif))
    np.testing.assert_array_equal(found, blob().transpose(Image.Transpose.ROTATE_270))
    assert images.alpha_of(bytes_of(photo(0))) is None


def test_masks_that_do_not_fit_are_left_out_with_a_warning(tmp_path):
    members = {
        "a.png": bytes_of(photo(0)),
        "a.mask.png": bytes_of(blob((60, 80))),
        "b.png": bytes_of(photo(1)),
        "b.mask.png": b"no image",
        "c.png": bytes_of(photo(2)),
        "c.mask.png": bytes_of(blob((40, 30))),
    }
    result = collect(tmp_path, members)
    assert len(result.kept) == 3
    assert len(result.notes) == 2
    assert "a.png: its mask: 60 x 80 px has other proportions" in result.notes[0]
    assert "b.png: its mask" in result.notes[1]
    assert list(stored_masks(tmp_path / "out")) == ["002.png"]
    assert Image.open(tmp_path / "out/002.mask.png").size == (80, 60)


def test_archives_carry_masks(tmp_path):
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"cat/{name}.png", bytes_of(photo(ord(name))))
            archive.writestr(f"cat/{name}.mask.png", bytes_of(blob()))
    source = Source(path=str(tmp_path / "cats.zip"))
    result = instance_images.collect("cat", source, LIMITS, tmp_path / "out")
    assert len(result.kept) == 2
    assert list(stored_masks(tmp_path / "out")) == ["000.png", "001.png"]
