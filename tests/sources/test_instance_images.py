"""Instance images from folders, archives, addresses and data sets; unsafe sources are refused and leave nothing."""

import hashlib
import io
import json
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from customdiff.config import Download, Source
from customdiff.errors import UserError
from customdiff.sources import archive, http, image_folder, instance_images

LIMITS = Download(minimum=2, maximum=10)


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, members: dict[str, bytes], mode="w", extra=()) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def collect(tmp_path, limits=LIMITS, transport=None, **source):
    return instance_images.collect("cat", Source(**source), limits, tmp_path / "out", transport=transport)


def refusal(tmp_path, *args, **source) -> str:
    """The message of the one-line error, after which nothing is left where the output would be."""
    with pytest.raises(UserError) as caught:
        collect(tmp_path, *args, **source)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


CATS = {"cat/img10.png": png("blue"), "cat/img2.png": png("red"), "cat/img2.txt": b"\xef\xbb\xbfa cat\r\n on a mat\n"}
POTS = {"pot/a.png": png("white"), "pot/b.png": png("black")}
JUNK = {"__MACOSX/cat/._img2.png": b"x", "cat/.hidden.png": b"x", "cat/notes.md": b"x", "cat/Thumbs.db": b"x"}


def test_a_folder_becomes_numbered_rgb_in_natural_order_with_captions_and_manifest(tmp_path):
    folder = write(tmp_path / "in", CATS | JUNK)
    result = collect(tmp_path, path=str(folder))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["000.png", "000.txt", "001.png", "manifest.json"]
    assert Image.open(out / "000.png").getpixel((0, 0)) == (255, 0, 0)  # img2 before img10
    assert (out / "000.txt").read_text() == "a cat on a mat\n"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["set_aside"] == []
    first = manifest["images"][0]
    assert first["source"] == "cat/img2.png"
    assert first["sha256"] == hashlib.sha256(CATS["cat/img2.png"]).hexdigest()
    assert first["size"] == [8, 6]
    assert [entry["source"] for entry in result.kept] == ["cat/img2.png", "cat/img10.png"]


def test_large_images_are_scaled_down_and_small_ones_are_stored_exactly(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8))
    (tmp_path / "in").mkdir()
    noise.save(tmp_path / "in" / "a.png")
    Image.new("RGB", (400, 100), "red").save(tmp_path / "in" / "b.png")
    collect(tmp_path, Download(minimum=2, max_side=100), path=str(tmp_path / "in"))
    assert (np.asarray(Image.open(tmp_path / "out/000.png")) == np.asarray(noise)).all()
    assert Image.open(tmp_path / "out/001.png").size == (100, 25)


def test_broken_and_repeated_images_are_named_and_set_aside(tmp_path):
    members = CATS | {
        "cat/x.png": png("red"),
        "cat/y.jpg": b"no",
        "cat/z.heic": b"\0\0\0\x18ftypheic",
        "cat/t.png": png("tan")[:45],
    }
    result = collect(tmp_path, path=str(write(tmp_path / "in", members)))
    reasons = {refused.name: refused.reason for refused in result.set_aside}
    assert reasons["cat/x.png"] == "the same file as cat/img2.png"
    assert "not an image" in reasons["cat/y.jpg"]
    assert "export it as JPEG or PNG" in reasons["cat/z.heic"]
    assert "broken" in reasons["cat/t.png"] or "truncated" in reasons["cat/t.png"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {refused["name"] for refused in manifest["set_aside"]} == set(reasons)


def test_too_few_good_images_is_an_error_that_says_what_was_set_aside(tmp_path):
    members = {"a.png": png("red"), "b.png": b"broken"}
    message = refusal(tmp_path, path=str(write(tmp_path / "in", members)))
    assert message.startswith("concepts.cat.source: 1 good image")
    assert "download.minimum is 2" in message
    assert "b.png: not an image" in message


def test_too_many_images_is_an_error_that_names_the_folders(tmp_path):
    write(tmp_path / "in", CATS | {f"pot/{n}.png": png((n, n, n)) for n in range(10)})
    message = refusal(tmp_path, path=str(tmp_path / "in"))
    assert "12 images" in message
    assert "download.maximum is 10" in message
    assert "cat, pot" in message


def test_a_failure_leaves_the_earlier_output_as_it_was(tmp_path):
    collect(tmp_path, path=str(write(tmp_path / "in", CATS)))
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError):
        collect(tmp_path, path=str(write(tmp_path / "poor", {"a.png": png("red")})))
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"path": "nowhere"}, "concepts.cat.source.path: nowhere"),
        ({"path": "empty"}, "empty"),
        ({"path": "in", "subfolder": "dog"}, "dog; folders with images: cat"),
        ({"path": "in", "sha256": "0" * 64}, "concepts.cat.source.sha256:"),
        ({"path": "in/cat/notes.md"}, "concepts.cat.source.path: the file is neither a zip nor a tar"),
        ({"path": "page.zip"}, "web page"),
        ({"path": "cut.zip"}, "the zip archive is damaged"),
        ({"path": "cut.tar.gz"}, "concepts.cat.source.path: the archive is damaged"),
        ({"path": "cats.zip", "subfolder": "dog"}, "dog; folders with images: cat"),
        ({"path": "cats.zip", "sha256": "0" * 64}, "concepts.cat.source.sha256:"),
    ],
)
def test_wrong_sources_get_one_line(tmp_path, monkeypatch, source, line):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", CATS | JUNK)
    (tmp_path / "empty").mkdir()
    whole = zipped(tmp_path / "cats.zip", CATS).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    whole = tarred(tmp_path / "whole.tar.gz", CATS, "w:gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.zip").write_bytes(b"\n<!DOCTYPE html><title>Sign in</title>")
    assert line in refusal(tmp_path, **source)


def test_the_instance_images_are_read_in_order(tmp_path):
    collect(tmp_path, path=str(write(tmp_path / "in", CATS)))
    assert [path.name for path in instance_images.instance_paths(tmp_path / "out")] == ["000.png", "001.png"]
    colors = [image.getpixel((0, 0)) for image in instance_images.read_instance_images(tmp_path / "out")]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(UserError, match=r"`dvc repro download-data@cat`"):
        instance_images.read_instance_images(tmp_path / "cat")


# Archives


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_every_kind_of_archive_gives_what_the_folder_gives_and_a_subfolder_selects(tmp_path, kind):
    members = CATS | POTS | JUNK
    if kind == "zip":
        archive = zipped(tmp_path / "data.bin", members)
    else:
        archive = tarred(tmp_path / "data.bin", {f"./{name}": data for name, data in members.items()}, kind)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest().upper()
    result = collect(tmp_path, path=str(archive), subfolder="cat/", sha256=digest)
    assert [entry["source"] for entry in result.kept] == ["img2.png", "img10.png"]
    assert result.notes == []
    everything = instance_images.collect("cat", Source(path=str(archive)), LIMITS, tmp_path / "all")
    assert len(everything.kept) == 4
    assert "come from 2 folders" in everything.notes[0]
    assert "cat, pot" in everything.notes[0]


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "cat/../../evil.png", "..\\evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_would_escape_make_the_archive_refused(tmp_path, name, kind):
    members = CATS | {name: png("pink")}
    archive = zipped(tmp_path / "a.zip", members) if kind == "zip" else tarred(tmp_path / "a.tar", members)
    assert "unsafe archive" in refusal(tmp_path, path=str(archive))
    assert not list(tmp_path.rglob("evil*"))
    assert not list(tmp_path.parent.glob("evil*"))


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_and_devices_are_never_made_and_never_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png("gold"))
    extra = [
        special("cat/link.png", tarfile.SYMTYPE, str(secret)),
        special("cat/hard.png", tarfile.LNKTYPE, "cat/img2.png"),
        special("cat/pipe.png", tarfile.FIFOTYPE),
        special("cat/device.png", tarfile.CHRTYPE),
        special("out", tarfile.SYMTYPE, str(tmp_path)),
    ]
    members = CATS | {"out/planted.png": png("pink")}
    archive = tarred(tmp_path / "a.tar", {}, "w", extra)
    with tarfile.open(archive, "a") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    result = collect(tmp_path, path=str(archive))
    aside = {refused.name for refused in result.set_aside if "a link or a device" in refused.reason}
    assert aside == {"cat/link.png", "cat/hard.png", "cat/pipe.png", "cat/device.png"}
    assert not (tmp_path / "planted.png").exists()
    colors = {Image.open(path).getpixel((0, 0)) for path in (tmp_path / "out").glob("*.png")}
    assert (255, 215, 0) not in colors


def test_a_link_in_a_zip_is_set_aside(tmp_path):
    archive = zipped(tmp_path / "a.zip", CATS)
    with zipfile.ZipFile(archive, "a") as opened:
        info = zipfile.ZipInfo("cat/link.png")
        info.external_attr = 0o120777 << 16
        opened.writestr(info, "/etc/passwd")
    aside = [(refused.name, refused.reason) for refused in collect(tmp_path, path=str(archive)).set_aside]
    assert aside == [("cat/link.png", "a link or a device, not a file")]


def zeros(megabytes):
    return bytes(megabytes * 1_000_000)


@pytest.mark.parametrize("kind", ["zip", "w:gz", "w:xz"])
def test_a_bomb_is_stopped_while_it_unpacks(tmp_path, kind):
    members = CATS | {"cat/big.png": zeros(3)}
    archive = zipped(tmp_path / "a", members) if kind == "zip" else tarred(tmp_path / "a", members, kind)
    assert archive.stat().st_size < 20_000
    limits = Download(minimum=2, max_megabytes=2)
    assert "download.max_megabytes (2)" in refusal(tmp_path, limits, path=str(archive))


def test_a_tar_bomb_of_a_file_that_is_not_wanted_is_stopped_too(tmp_path):
    archive = tarred(tmp_path / "a", {"padding.bin": zeros(3)} | CATS, "w:gz")
    assert "unpacks to more" in refusal(tmp_path, Download(minimum=2, max_megabytes=2), path=str(archive))


@pytest.mark.parametrize("claimed", [10, 2**32 - 2])
def test_a_zip_whose_header_lies_about_the_size_is_refused(tmp_path, claimed):
    """The uncompressed size of a member is rewritten by hand in both of its headers."""
    archive = zipped(tmp_path / "a.zip", {"cat/big.png": zeros(3)} | CATS)
    data = bytearray(archive.read_bytes())
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, local + 22, claimed)
    struct.pack_into("<I", data, central + 24, claimed)
    archive.write_bytes(data)
    message = refusal(tmp_path, Download(minimum=2, max_megabytes=2), path=str(archive))
    assert "damaged" in message or "unpacks to more" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_a_method_that_is_unpacked_whole_is_refused(tmp_path, method):
    """zipfile limits what it holds in memory for deflate alone."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, content in CATS.items():
            archive.writestr(name, content)
    assert re.search(r"cat/img\d+\.png .*deflate", refusal(tmp_path, path=str(tmp_path / "a.zip")))


def test_an_encrypted_zip_is_refused_in_one_line(tmp_path):
    archive = zipped(tmp_path / "a.zip", CATS)
    data = bytearray(archive.read_bytes())
    for place in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
        data[place] |= 1  # bit 0 of the general purpose flags: encrypted
    archive.write_bytes(data)
    assert "the zip is encrypted (cat/img10.png)" in refusal(tmp_path, path=str(archive))


def test_a_sparse_member_is_not_unpacked(tmp_path):
    """A header of 512 bytes may claim any size for a sparse file."""
    sparse = tarfile.TarInfo("cat/sparse.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"00777777777\0"  # real size: 1 GiB - 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    packed = tarred(tmp_path / "a.tar", CATS).read_bytes()
    (tmp_path / "b.tar").write_bytes(bytes(block) + packed)
    result = collect(tmp_path, path=str(tmp_path / "b.tar"))
    assert [refused.name for refused in result.set_aside] == ["cat/sparse.png"]
    assert len(result.kept) == 2


def test_a_bug_of_ours_keeps_its_traceback_while_a_data_set_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_images, "_hub_image", lambda *_: 1 / 0)
    source = Source.model_construct(hub=str(write(tmp_path / "set", {"a.png": png("red")})), path=None, url=None)
    with pytest.raises(ZeroDivisionError):
        instance_images.collect("cat", source, LIMITS, tmp_path / "out")


def test_a_network_that_fails_while_a_photo_is_read_gets_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise httpx.ConnectError("down")

    monkeypatch.setattr(instance_images, "_hub_image", fail)
    source = Source.model_construct(hub=str(write(tmp_path / "set", {"a.png": png("red")})), path=None, url=None)
    with pytest.raises(UserError, match=r"cat\.source\.hub: .*ConnectError"):
        instance_images.collect("cat", source, LIMITS, tmp_path / "out")


def test_an_archive_above_the_limit_is_refused_unopened(tmp_path):
    archive = tarred(tmp_path / "a.tar", {"cat/big.png": zeros(3)})
    message = refusal(tmp_path, Download(minimum=2, max_megabytes=2), path=str(archive))
    assert "download.max_megabytes (2)" in message


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    assert "3 members" in refusal(tmp_path, path=str(zipped(tmp_path / "a.zip", CATS | POTS)))


# Addresses

HOME = "https://93.184.216.34"  # a literal public address: no name is looked up


def serve(routes, seen=None):
    """A stand-in for the network: routes from address to (status, headers, body)."""

    def answer(request):
        if seen is not None:
            seen.append(str(request.url))
        status, headers, body = routes[str(request.url)]
        return httpx.Response(status, headers=headers, content=body)

    return httpx.MockTransport(answer)


def moved(to):
    return 302, {"location": to}, b""


def test_an_https_archive_is_fetched_through_redirects(tmp_path):
    body = zipped(tmp_path / "a.zip", CATS).read_bytes()
    routes = {f"{HOME}/{n}": moved(f"/{n + 1}") for n in range(5)} | {f"{HOME}/5": (200, {}, body)}
    result = collect(tmp_path, transport=serve(routes), url=f"{HOME}/0", sha256=hashlib.sha256(body).hexdigest())
    assert len(result.kept) == 2
    routes = {f"{HOME}/{n}": moved(f"/{n + 1}") for n in range(6)} | {f"{HOME}/6": (200, {}, body)}
    (tmp_path / "out").rename(tmp_path / "done")
    assert "more than 5 redirects" in refusal(tmp_path, transport=serve(routes), url=f"{HOME}/0")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://93.184.216.34/a.zip", "http://"),
        ("file:///etc/passwd", "file://"),
        ("https://127.0.0.1/a.zip", "127.0.0.1"),
        ("https://localhost/a.zip", "localhost"),
        ("https://10.1.2.3/a.zip", "10.1.2.3"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("https://[::1]/a.zip", "::1"),
        ("https://[::ffff:127.0.0.1]/a.zip", "127.0.0.1"),
    ],
)
def test_redirects_to_other_schemes_and_private_hosts_are_not_followed(tmp_path, target, reason):
    seen = []
    transport = serve({f"{HOME}/a.zip": moved(target)}, seen)
    message = refusal(tmp_path, transport=transport, url=f"{HOME}/a.zip")
    assert message.startswith("concepts.cat.source.url: ")
    assert reason in message
    assert seen == [f"{HOME}/a.zip"]


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://192.168.1.5:443/a.zip", ("192.168.1.5", None)),
        ("https://192.168.1.5/a.zip", ("192.168.1.5", None)),
        ("https://192.168.1.5:80/a.zip", ("192.168.1.5", 80)),
        ("http://10.0.0.5:80/a.zip", ("10.0.0.5", None)),
        ("https://10.0.0.5:none/a.zip", ("", None)),
    ],
)
def test_a_default_port_that_an_address_names_is_the_same_origin(url, origin):
    assert http.origin_of(url) == origin


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, {}, b""), "404"),
        ((503, {}, b""), "503"),
        ((200, {}, b"x" * 2_100_000), "download.max_megabytes"),
        ((200, {"content-length": "9999999999"}, b"x"), "download.max_megabytes"),
        ((200, {}, b"<html>log in</html>"), "web page"),
    ],
)
def test_a_download_that_fails_gets_one_line_that_names_the_key(tmp_path, answer, reason):
    limits = Download(minimum=2, max_megabytes=2)
    message = refusal(tmp_path, limits, serve({f"{HOME}/a.zip": answer}), url=f"{HOME}/a.zip")
    assert message.startswith("concepts.cat.source.url: ")
    assert reason in message


def test_a_network_that_is_down_gets_one_line(tmp_path):
    def down(request):
        raise httpx.ConnectError("Name or service not known")

    def silent(request):
        raise httpx.ReadTimeout("")

    message = refusal(tmp_path, transport=httpx.MockTransport(down), url=f"{HOME}/a.zip")
    assert "cannot be reached (Name or service not known)" in message
    message = refusal(tmp_path, transport=httpx.MockTransport(silent), url=f"{HOME}/a.zip")
    assert "no answer within 30 s" in message


def test_an_endless_answer_is_cut_at_the_limit_and_at_the_deadline():
    def endless():
        while True:
            yield b"x" * 1000

    client = http.client(5, httpx.MockTransport(lambda request: httpx.Response(200, content=endless())))
    with pytest.raises(http.TooLargeError, match=r"0\.1 MB"):
        http.fetch(client, HOME, io.BytesIO(), max_bytes=1e5, deadline=5)
    with pytest.raises(http.FetchError, match="not complete"):
        http.fetch(client, HOME, io.BytesIO(), max_bytes=1e12, deadline=0.05)


# Hub data sets, by a local folder that `datasets` reads with the same code


def test_a_data_set_is_streamed_undecoded_and_its_text_column_becomes_captions(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "one\ncat"},
        {"file_name": "b.png", "text": ""},
        {"file_name": "c.png", "text": ""},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    folder = {"a.png": png("red"), "b.png": b"broken", "c.png": png("blue"), "metadata.jsonl": lines}
    source = Source.model_construct(hub=str(write(tmp_path / "set", folder)), path=None, url=None)
    result = instance_images.collect("cat", source, LIMITS, tmp_path / "out")
    assert [entry["source"] for entry in result.kept] == ["a.png", "c.png"]
    assert (tmp_path / "out/000.txt").read_text() == "one cat\n"
    assert not (tmp_path / "out/001.txt").exists()
    assert [refused.name for refused in result.set_aside] == ["b.png"]
    with pytest.raises(UserError, match=r"has more than 2 images \(download.maximum\)"):
        instance_images.collect("cat", source, Download(minimum=1, maximum=2), tmp_path / "out")
    wrong = source.model_copy(update={"split": "nowhere"})
    with pytest.raises(UserError, match=r"concepts\.cat\.source\.hub: .* cannot be read"):
        instance_images.collect("cat", wrong, LIMITS, tmp_path / "out")


def test_a_row_of_a_data_set_cannot_point_at_a_file_of_this_machine(tmp_path):
    secret = write(tmp_path, {"secret.png": png("gold")}) / "secret.png"
    for name in ("owner/set", str(write(tmp_path / "set", {"a.png": png("red")}))):
        for path in (
            str(secret),
            f"file://{secret}",
            f"hf://datasets/owner/set-of-another@main/{secret}",
            "http://127.0.0.1/a",
        ):
            item = instance_images._hub_image({"bytes": None, "path": path}, None, name, LIMITS, 0)
            assert "outside" in item.problem
            assert item.data == b""


def test_natural_order():
    names = ["b1.png", "a10.png", "a2.png", "A2.png", "a02.png", "10.png", "9.png"]
    assert sorted(names, key=image_folder.natural) == [
        "9.png",
        "10.png",
        "A2.png",
        "a02.png",
        "a2.png",
        "a10.png",
        "b1.png",
    ]
