"""Photos that are dropped on the page: what is no photo is refused by name, and nothing is written elsewhere."""

import io

import pytest
from conftest import ROOT
from PIL import Image

from customdiff.app.dropped import DroppedPhotos
from customdiff.config import Download
from customdiff.errors import UserError

LIMITS = Download(minimum=1, maximum=3, max_megapixels=1)
PHOTO = (ROOT / "data/concepts/cat/01.png").read_bytes()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dropped():
    photos = DroppedPhotos()
    yield photos
    photos.clean_up()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.jpg", b"only text", r"^notes\.jpg: not an image"),
        ("page.png", b"<html><script>alert(1)</script>", r"^page\.png: .*web page"),
        ("large.png", b"\0" * 65_000_000, r"^large\.png: 65 MB, above 64 MB"),
        ("bomb.png", png(2000, 2000), r"^bomb\.png: too large: 2000 x 2000 px"),
        ("program.exe", PHOTO, r"^program\.exe: not a photo by its name"),
        ("cut.png", PHOTO[:500], r"^cut\.png: broken or truncated"),
        ("empty.jpg", b"", r"^empty\.jpg: empty file"),
        ("clip.heic", b"\0\0\0\x18ftypheic" + b"\0" * 20, r"^clip\.heic: HEIC"),
    ],
)
def test_what_is_no_photo_is_refused_by_name(dropped, name, data, message):
    with pytest.raises(UserError, match=message):
        dropped.add(name, data, LIMITS)
    assert dropped.names == []


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../params.yaml.png", "params.yaml.png"),
        ("/etc/cron.d/x.png", "etc-cron.d-x.png"),
        ("<img src=x onerror=alert(1)>.png", "img-src-x-onerror-alert-1-.png"),
        (".hidden.png", "hidden.png"),
        ("Кот 1.png", "Кот-1.png"),
        ("a\0b\n.png", "a-b-.png"),
        ("x" * 300 + ".png", "x" * 96 + ".png"),
    ],
)
def test_names_become_harmless(dropped, name, safe):
    assert dropped.add(name, PHOTO, LIMITS) == safe
    assert dropped.names == [safe]
    assert [path.name for path in dropped.folder.iterdir()] == [safe]


def test_a_long_name_in_any_script_is_a_file_name(dropped):
    name = dropped.add("猫" * 90 + ".png", PHOTO, LIMITS)
    assert name.endswith("猫.png")
    assert dropped.names == [name]


def test_photos_of_one_name_are_kept_apart(dropped):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    assert dropped.add("a b.png", PHOTO, LIMITS) == "a-b.png"
    assert dropped.add("a-b.png", buffer.getvalue(), LIMITS) == "a-b-2.png"
    assert dropped.add("a-b.png", PHOTO, LIMITS) == "a-b.png"  # the same photo again
    assert dropped.names == ["a-b-2.png", "a-b.png"]


def test_a_caption_of_another_photo_is_not_overwritten(dropped):
    for caption in (b"{} in snow", b"{} in snow\n"):
        assert dropped.add("a b.txt", caption, LIMITS) == "a-b.txt"
    with pytest.raises(UserError, match=r"a-b\.txt: left out"):
        dropped.add("a b.txt", b"{} on grass", LIMITS)
    assert (dropped.folder / "a-b.txt").read_text() == "{} in snow\n"


def test_only_so_many_photos_are_kept(dropped):
    for number in range(3):
        dropped.add(f"{number}.png", PHOTO, LIMITS)
    dropped.add("2.png", PHOTO, LIMITS)  # again
    with pytest.raises(UserError, match=r"3\.png: left out: download\.maximum is 3"):
        dropped.add("3.png", PHOTO, LIMITS)


def test_photos_can_be_left_out_with_their_captions(dropped):
    dropped.add("1.png", PHOTO, LIMITS)
    dropped.add("1.txt", b"a {} cat\n\n", LIMITS)
    assert (dropped.folder / "1.txt").read_text() == "a {} cat\n"
    dropped.remove("1.png")
    assert list(dropped.folder.iterdir()) == []


def test_nothing_stays_when_the_page_is_closed():
    photos = DroppedPhotos()
    photos.add("1.png", PHOTO, LIMITS)
    photos.work()
    photos.clean_up()
    assert not photos.folder.parent.exists()
