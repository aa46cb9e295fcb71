"""Photos are copied with what belongs to them, and never touched themselves."""

import os
import zipfile

import pytest
from conftest import noisy_images

from customdiff.config import Download, Source
from customdiff.errors import UserError
from customdiff.files import sha256
from customdiff.new_concept import photos


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def album(tmp_path):
    """Five photos 000.png to 004.png, the first with a caption and a mask, the second with a mask by its full name."""
    folder = tmp_path / "album"
    paths = noisy_images(folder, 5)
    paths[0].with_suffix(".txt").write_text("a {} on grass")
    for path, mask in ((paths[0], "000.mask.png"), (paths[1], "001.png.mask.png")):
        (folder / mask).write_bytes(path.read_bytes())
    return folder


def test_captions_and_masks_go_along_and_the_originals_stay(album, tmp_path):
    before = {path: sha256(path) for path in album.iterdir()}
    photos.gather([album], tmp_path / "copy", tmp_path / "work", Download())
    assert {path: sha256(path) for path in album.iterdir()} == before
    assert {path.name: sha256(path) for path in (tmp_path / "copy").iterdir()} == {
        path.name: digest for path, digest in before.items()
    }


def test_files_bring_their_sidecars_whether_the_shell_names_these_or_not(album, tmp_path):
    some = [album / "000.png", album / "001.png"]
    photos.gather(some, tmp_path / "named", tmp_path / "work", Download())
    photos.gather(sorted(album.glob("00[01].*")) + some, tmp_path / "globbed", tmp_path / "work", Download())
    expected = ["000.mask.png", "000.png", "000.txt", "001.png", "001.png.mask.png"]
    assert names(tmp_path / "named") == names(tmp_path / "globbed") == expected


def test_photos_of_equal_names_are_kept_apart(album, tmp_path):
    other = tmp_path / "other"
    noisy_images(other, 1, seed=1)
    (other / "000.txt").write_text("a {} in the snow")
    photos.gather([album / "000.png", other], tmp_path / "copy", tmp_path / "work", Download())
    assert names(tmp_path / "copy") == ["000-2.png", "000-2.txt", "000.mask.png", "000.png", "000.txt"]
    assert (tmp_path / "copy/000-2.txt").read_text() == "a {} in the snow"
    assert sha256(tmp_path / "copy/000-2.png") == sha256(other / "000.png")


def test_a_numbered_name_takes_no_other_photos_name(tmp_path):
    first = noisy_images(tmp_path / "a", 1)
    second = noisy_images(tmp_path / "b", 2, seed=1)
    second[1].rename(tmp_path / "b/000-2.png")
    photos.gather([tmp_path / "a", tmp_path / "b"], tmp_path / "copy", tmp_path / "work", Download())
    originals = {sha256(path) for path in (first[0], second[0], tmp_path / "b/000-2.png")}
    assert {sha256(path) for path in (tmp_path / "copy").iterdir()} == originals


def test_a_photo_whose_name_cannot_be_decoded_is_kept(album, tmp_path):
    (album / "000.png").rename(os.fsdecode(os.fsencode(album) + b"/caf\xe9.png"))
    copy = tmp_path / "copy"
    photos.gather([album], copy, tmp_path / "work", Download())
    checked = photos.check("rex", Source(path=str(copy)), Download(), tmp_path / "instances")
    photos.remove_set_aside(copy, checked)
    assert len(checked.kept) == 5
    assert os.fsdecode(b"caf\xe9.png") in names(copy)


def test_an_archive_is_unpacked(album, tmp_path):
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as opened:
        for path in album.iterdir():
            opened.write(path, f"summer/{path.name}")
    photos.gather([tmp_path / "album.zip"], tmp_path / "copy", tmp_path / "work", Download())
    assert names(tmp_path / "copy") == names(album)


def test_bad_photos_and_what_belongs_to_them_alone_are_not_kept(album, tmp_path):
    (album / "bad.jpg").write_bytes(b"no photo")
    (album / "bad.txt").write_text("a {}")
    (album / "bad.mask.png").write_bytes(b"")
    (album / "same.png").write_bytes((album / "000.png").read_bytes())
    copy = tmp_path / "copy"
    photos.gather([album], copy, tmp_path / "work", Download())
    checked = photos.check("rex", Source(path=str(copy)), Download(), tmp_path / "instances")
    photos.remove_set_aside(copy, checked)
    assert {refused.name for refused in checked.set_aside} == {"bad.jpg", "same.png"}
    assert names(copy) == sorted(set(names(album)) - {"bad.jpg", "bad.txt", "bad.mask.png", "same.png"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "missing does not exist"),
        (lambda folder: folder / "empty", "empty contains no photos"),
        (lambda folder: folder / "notes.md", "notes.md is not a photo"),
        (lambda folder: folder / "a.txt", "no photos, only captions"),
        (lambda folder: folder / "pipe.png", "pipe.png does not exist"),
    ],
)
def test_what_is_no_photo_is_named_in_one_line(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / "a.txt").write_text("a {}")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"^PHOTOS: ") as error:
        photos.gather([make(tmp_path)], tmp_path / "copy", tmp_path / "work", Download())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "copy").exists()


def test_too_many_photos_are_refused_before_any_is_copied(album, tmp_path):
    with pytest.raises(UserError, match=r"5 photos.*download\.maximum is 3"):
        photos.gather([album], tmp_path / "copy", tmp_path / "work", Download(maximum=3, minimum=1))
    assert not (tmp_path / "copy").exists()
