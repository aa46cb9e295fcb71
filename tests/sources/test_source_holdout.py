"""A photo that is kept out of training is not trained on: it is found in folders, archives and stored images."""

import shutil
import zipfile

import numpy as np
import pytest
from conftest import concept_values
from PIL import Image

from customdiff.config import Concept, Download
from customdiff.errors import UserError
from customdiff.sources import holdout, instance_images

LIMITS = Download(minimum=1, max_side=64)


def photo(seed, size=(80, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def concept(tmp_path, monkeypatch):
    """A concept of two photos and two holdout photos, all different; a call gives its section."""
    monkeypatch.chdir(tmp_path)
    for folder, seeds in (("photos", (1, 2)), ("kept", (3, 4))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            photo(seed).save(tmp_path / folder / f"{seed}.png")

    def of(**source):
        values = concept_values() | {"holdout": "kept", "source": source or {"path": "photos"}}
        return Concept.model_validate(values)

    return of


def test_other_photos_are_accepted(concept):
    holdout.check_source("cat", concept(), LIMITS)


def test_a_concept_without_holdout_or_with_a_source_elsewhere_is_not_read(concept, tmp_path):
    holdout.check_source("cat", concept().model_copy(update={"holdout": None}), LIMITS)
    holdout.check_source("cat", concept(url="https://host.org/a.zip"), LIMITS)
    holdout.check_source("cat", concept(path="nowhere"), LIMITS)


def rotated(path):
    """A copy that decodes to the same pixels: stored sideways, with a tag that turns it."""
    image = Image.open("kept/4.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise when shown
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize(
    "copy",
    [
        lambda path: shutil.copy("kept/4.png", path),
        lambda path: Image.open("kept/4.png").save(path, "BMP"),
        rotated,
    ],
    ids=["the same bytes", "another format", "another orientation"],
)
def test_both_files_are_named(concept, tmp_path, copy):
    copy(tmp_path / "photos/copy.png")
    with pytest.raises(UserError, match=r"^concepts\.cat\.holdout: kept/4\.png .*copy\.png") as error:
        holdout.check_source("cat", concept(), LIMITS)
    assert "\n" not in str(error.value)


def test_a_jpeg_and_a_lossless_copy_of_its_pixels_are_the_same_photo(concept, tmp_path):
    smooth = photo(5, (12, 9)).resize((1200, 900))
    smooth.save(tmp_path / "kept/5.jpg", quality=60)
    Image.open(tmp_path / "kept/5.jpg").save(tmp_path / "photos/copy.png")
    limits = Download(minimum=1)
    with pytest.raises(UserError, match=r"kept/5\.jpg .*copy\.png"):
        holdout.check_source("cat", concept(), limits)
    Image.open(tmp_path / "kept/5.jpg").crop((0, 0, 1199, 900)).save(tmp_path / "photos/copy.png")
    holdout.check_source("cat", concept(), limits)


def test_a_photo_in_an_archive_is_found(concept, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "photos/1.png", "cats/1.png")
        archive.write(tmp_path / "kept/3.png", "cats/again.png")
    with pytest.raises(UserError, match=r"kept/3\.png .*again\.png"):
        holdout.check_source("cat", concept(path="photos.zip"), LIMITS)


def test_a_photo_that_cannot_be_read_is_left_to_the_download_unless_it_is_a_holdout_photo(concept, tmp_path):
    (tmp_path / "photos/broken.png").write_bytes(b"")
    holdout.check_source("cat", concept(), LIMITS)
    (tmp_path / "kept/broken.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"kept/broken\.png: empty"):
        holdout.check_source("cat", concept(), LIMITS)


def test_a_downloaded_photo_is_found_at_the_size_at_which_it_is_stored(concept, tmp_path):
    (tmp_path / "photos/again.png").write_bytes((tmp_path / "kept/3.png").read_bytes())
    instance_images.collect("cat", concept().source, LIMITS, tmp_path / "stored")
    with pytest.raises(UserError, match=r"kept/3\.png .*stored/002\.png"):
        holdout.check_instances("cat", concept(), LIMITS, tmp_path / "stored")
