"""Captions and masks beside photos, as the stage prepare reads them, and photos that are set aside."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, concept_values
from PIL import Image

from customdiff import config
from customdiff.config import Concept, Source
from customdiff.errors import UserError
from customdiff.new_concept import photo_files
from customdiff.sources.instance_images import collect

CONCEPT = Concept.model_validate(concept_values())


@pytest.fixture
def photos(tmp_path) -> Path:
    without = shutil.ignore_patterns("*.txt", "*.md")
    return Path(shutil.copytree(ROOT / "data/concepts/cat", tmp_path / "photos", ignore=without))


def collected(photos: Path, out: Path):
    return collect("cat", Source(path=str(photos)), config.Download(minimum=1), out)


@pytest.mark.parametrize("text", ["a {} cat, asleep", " a <new1> cat,\n asleep "])
def test_a_caption_is_what_the_stage_reads(photos, tmp_path, text):
    path = photo_files.write_caption(photos / "01.png", text, CONCEPT)
    assert path.read_text() == "a {} cat, asleep\n"
    (entry, *_) = collected(photos, tmp_path / "out").kept
    assert (tmp_path / "out" / entry["caption"]).read_text() == "a {} cat, asleep\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a cat", "must contain"), ("{} beside <new2>", "<new2>"), ("a {} <b>cat</b>", "names <b>")],
)
def test_a_wrong_caption_is_not_written(photos, text, message):
    (photos / "01.txt").write_text("a {} cat\n")
    with pytest.raises(UserError, match=message) as error:
        photo_files.write_caption(photos / "01.png", text, CONCEPT)
    assert str(error.value).startswith("01.txt:")
    assert (photos / "01.txt").read_text() == "a {} cat\n"


@pytest.mark.parametrize("read", [photo_files.captions_of, photo_files.shown_photos])
def test_a_wrong_caption_is_reported_with_the_users_file(photos, read):
    (photos / "03.txt").write_text("a cat of another trainer\n")
    params = config.Params.model_validate({"concepts": {"cat": concept_values() | {"source": {"path": str(photos)}}}})
    with pytest.raises(UserError, match=r"^03\.txt: the caption must contain"):
        read(params, "cat")


def test_a_mask_is_what_the_stage_reads(photos, tmp_path):
    mask = Image.new("L", Image.open(photos / "02.png").size)
    mask.paste(255, (10, 20, 60, 90))
    assert photo_files.write_mask(photos / "02.png", mask).name == "02.png.mask.png"
    entry = collected(photos, tmp_path / "out").kept[1]
    assert entry["mask_from"] == "file"
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / entry["mask"])), np.asarray(mask))


def test_a_photo_is_set_aside_with_what_belongs_to_it_and_brought_back(photos, tmp_path):
    (photos / "03.txt").write_text("a {} cat\n")
    Image.new("L", (8, 8)).save(photos / "03.mask.png")
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    aside = photo_files.set_aside(photos / "03.png")
    assert [entry["source"] for entry in collected(photos, tmp_path / "out").kept] == [
        f"0{n}.png" for n in (1, 2, 4, 5)
    ]
    assert not list(photos.glob("03*"))
    assert photo_files.photos_aside(photos) == [aside]
    assert photo_files.bring_back(aside) == photos / "03.png"
    assert {path.name: path.read_bytes() for path in photos.iterdir() if path.is_file()} == before


def test_moving_a_photo_overwrites_nothing_and_takes_nothing_of_another_photo(photos):
    aside = photo_files.set_aside(photos / "03.png")
    Image.new("RGB", (9, 9)).save(photos / "03.png")  # a better one
    for move, photo in ((photo_files.bring_back, aside), (photo_files.set_aside, photos / "03.png")):
        with pytest.raises(UserError, match=r"03\.png: exists already"):
            move(photo)
    assert Image.open(photos / "03.png").size == (9, 9)
    Image.new("RGB", (9, 9)).save(photos / "04.jpg")
    (photos / "04.txt").write_text("a {} cat\n")  # of both
    photo_files.set_aside(photos / "04.jpg")
    assert (photos / "04.txt").exists()
    photo_files.set_aside(photos / "04.png")
    assert not (photos / "04.txt").exists()


def test_shown_photos_are_what_prepare_makes(photos):
    text = (ROOT / "params.yaml").read_text().replace("path: data/concepts/cat", f"path: {photos}")
    for name in ("base", "captioner", "segmenter"):
        text = text.replace(f"data/{name}", str(ROOT / "data" / name))
    params = config.parse(text)
    prepare = params.prepare.model_copy(update={"captioner": None, "segmenter": str(ROOT / "data/segmenter")})
    photo_files.write_caption(photos / "01.png", "a {} cat on a sofa", CONCEPT)
    shown = photo_files.shown_photos(params.model_copy(update={"prepare": prepare}), "cat")
    assert [each.name for each in shown] == [f"0{number}.png" for number in range(1, 6)]
    assert [each.example.caption for each in shown] == ["a <new1> cat on a sofa", *["photo of a <new1> cat"] * 4]
    for each in shown:  # that of a photo with a caption, too
        assert each.example.mask is not None
        assert each.example.mask.coverage.shape == (each.image.height, each.image.width)


def test_a_source_without_a_folder_takes_no_captions(tmp_path):
    concept = Concept.model_validate(concept_values() | {"source": {"path": str(tmp_path / "photos.zip")}})
    with pytest.raises(UserError, match=r"concepts\.cat\.source"):
        photo_files.source_folder("cat", concept)
