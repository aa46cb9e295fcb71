"""Class images of every backend, compared with brute force in numpy or with cases made by hand."""

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT, concept_values, noisy_images, tiny_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from customdiff.config import Params, Service, Train
from customdiff.errors import UserError
from customdiff.models.clip import Clip
from customdiff.retrieval import class_images, clip_index, clip_service, clip_tool


def settings(retrieve: dict, base: str = "none") -> Params:
    wanted = {"num_class_images": 4, "minimum": 2} | retrieve
    concepts = {"cat": concept_values()}
    return Params.model_validate({"base": {"model": base, "device": "cpu"}, "concepts": concepts, "retrieve": wanted})


def retrieve(tmp_path: Path, params: Params, **options) -> class_images.Retrieved:
    return class_images.retrieve(
        params, "cat", instances=tmp_path / "instances", index=tmp_path / "index", out=tmp_path / "out", **options
    )


@pytest.fixture
def instances(tmp_path) -> list[Path]:
    return noisy_images(tmp_path / "instances", 2, seed=99)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8))


def layout(out: Path) -> list[tuple[str, str, str]]:
    """(image, caption, url) of each line of the reference's three files, and the folder holds those images alone."""
    lines = [(out / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
    assert sorted(lines[0]) == sorted(f"images/{path.name}" for path in (out / "images").iterdir())
    assert {path.name for path in out.iterdir()} == {"images", "images.txt", "caption.txt", "urls.txt", "manifest.json"}
    manifest = json.loads((out / "manifest.json").read_text())["images"]
    rows = list(zip(*lines, strict=True))
    assert [(entry["file"], entry["caption"], entry["source"]) for entry in manifest] == rows
    return rows


# folder, and what every backend has in common


def test_a_folder_gives_the_reference_layout_in_natural_order(tmp_path, instances):
    folder = tmp_path / "mine" / "cat"
    folder.mkdir(parents=True)
    for number in (10, 9, 1):
        noise(number).save(folder / f"{number}.png")
    noise(3).save(folder / "2.jpg")
    (folder / "9.txt").write_text("a cat\n\non a\tmat\n")
    retrieve(tmp_path, settings({"backend": "folder", "folder": str(tmp_path / "mine/{}")}))
    assert layout(tmp_path / "out") == [
        ("images/000000.png", "cat", "1.png"),
        ("images/000001.jpg", "cat", "2.jpg"),
        ("images/000002.png", "a cat on a mat", "9.png"),
        ("images/000003.png", "cat", "10.png"),
    ]
    assert (np.asarray(Image.open(tmp_path / "out/images/000002.png")) == np.asarray(noise(9))).all()


def test_instance_images_repeats_and_broken_files_are_left_out(tmp_path, instances):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "0.bmp").write_bytes(encoded(Image.open(instances[1]), "BMP"))  # the same pixels in another file
    (folder / "1.png").write_bytes(encoded(noise(1)))
    (folder / "2.tiff").write_bytes(encoded(noise(1), "TIFF"))
    (folder / "3.png").write_bytes(b"broken")
    (folder / "4.png").write_bytes(encoded(noise(4)))
    result = retrieve(tmp_path, settings({"backend": "folder", "folder": str(folder)}))
    assert [entry["source"] for entry in result.kept] == ["1.png", "4.png"]
    reasons = {refused.name: refused.reason for refused in result.set_aside}
    assert reasons["0.bmp"] == "the same pixels as an instance image"
    assert reasons["2.tiff"] == "the same pixels as 1.png"
    assert "not an image" in reasons["3.png"]
    assert "2 class images found for 'cat' (concepts.cat), retrieve.num_class_images is 4" in result.notes[0]


def test_fewer_than_the_minimum_is_an_error_that_leaves_nothing(tmp_path, instances):
    noisy_images(tmp_path / "mine", 1)
    with pytest.raises(UserError, match=r"^1 class images .* retrieve\.minimum is 2; .*retrieve\.folder"):
        retrieve(tmp_path, settings({"backend": "folder", "folder": str(tmp_path / "mine")}))
    assert not list(tmp_path.glob("out*"))


def test_wrong_folders_get_one_line(tmp_path, instances):
    with pytest.raises(UserError, match=r"^retrieve\.folder: "):
        retrieve(tmp_path, settings({"backend": "folder", "folder": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"^retrieve\.index\.pool: .*nowhere"):
        list(clip_index.pool_images(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"`dvc repro index-pool`"):
        retrieve(tmp_path, settings({"backend": "index"}))
    for image in instances:
        image.unlink()
    with pytest.raises(UserError, match=r"`dvc repro download-data@instances`"):
        retrieve(tmp_path, settings({"backend": "folder"}))


def test_the_stages_start_without_torch():
    """The import takes seconds, which every stage that needs no torch would pay."""
    modules = "customdiff.retrieval.class_images, customdiff.retrieval.clip_index, customdiff.sources.instance_images"
    program = f"import sys; import {modules}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(
    ("train", "key"),
    [({"with_prior_preservation": False}, "with_prior_preservation"), ({"method": "textual_inversion"}, "method")],
)
def test_training_without_class_images_gets_empty_lists_and_the_reason(tmp_path, train, key):
    section = Train.model_validate(train)
    assert not section.preserves_prior
    reason = class_images.write_unused(section, tmp_path / "out")
    assert f"train.{key}: " in reason
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert texts.pop("README.txt") == f"{reason}\n"
    assert json.loads(texts.pop("manifest.json")) == {"images": []}
    assert texts == {"caption.txt": "", "urls.txt": "", "images.txt": ""}


# generate


def test_the_base_model_draws_them_from_the_class_prompt_and_the_seed(tmp_path, instances, tiny_base):
    options = {"backend": "generate", "generate": {"steps": 2, "guidance_scale": 1.5, "batch_size": 3}}
    params = settings(options, str(tiny_base))
    first = retrieve(tmp_path, params)
    rows = layout(tmp_path / "out")
    assert [caption for _, caption, _ in rows] == ["cat"] * 4
    assert len({entry["sha256"] for entry in first.kept}) == 4
    assert [entry["sha256"] for entry in retrieve(tmp_path, params).kept] == [entry["sha256"] for entry in first.kept]
    other = params.model_copy(update={"base": params.base.model_copy(update={"seed": 7})})
    assert not {e["sha256"] for e in retrieve(tmp_path, other).kept} & {e["sha256"] for e in first.kept}


# index


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def write_index(folder: Path, vectors: np.ndarray, names: list[str]) -> None:
    """What `build_index` writes, made by hand."""
    (folder / clip_index.EMBEDDINGS).parent.mkdir(parents=True)
    np.save(folder / clip_index.EMBEDDINGS, vectors.astype(np.float16))
    (folder / "rows.json").write_text(json.dumps([{"name": name, "caption": f"about {name}"} for name in names]))


def brute_force(vectors, query, threshold, exclude):
    """Greedy choice in float64, one comparison at a time."""
    kept = []
    for row in sorted(range(len(vectors)), key=lambda row: -float(vectors[row] @ query)):
        others = [*exclude, *(vectors[other] for other in kept)]
        if all(float(vectors[row] @ other) < threshold for other in others):
            kept.append(row)
    return kept


@pytest.mark.parametrize(("first", "at_once"), [(1, 1000), (7, 50), (1000, 120)])
def test_a_query_gives_what_brute_force_gives(tmp_path, monkeypatch, first, at_once):
    monkeypatch.setattr(clip_index, "ROWS_AT_ONCE", at_once)
    random = np.random.default_rng(3)
    groups = np.repeat(random.normal(size=(30, 16)), 4, axis=0)  # each of 30 directions four times, nearly
    vectors = unit(unit(groups + 0.05 * random.normal(size=groups.shape)).astype(np.float16).astype(np.float64))
    query, exclude = unit(random.normal(size=16)), vectors[[5, 77]]
    write_index(tmp_path / "index", vectors, [str(number) for number in range(120)])
    for threshold in (0.98, 0.9, 0.5):
        hits = list(
            clip_index.query_index(
                tmp_path / "index", query, duplicate_similarity=threshold, exclude=exclude, first=first
            )
        )
        exact = vectors.astype(np.float64)
        assert [hit.row for hit in hits] == brute_force(exact, query, threshold, exact[[5, 77]])
        assert np.allclose([hit.similarity for hit in hits], [exact[hit.row] @ query for hit in hits], atol=1e-3)


def test_more_hits_than_there_was_room_for_at_first(tmp_path):
    """Of 2500 vectors the last 500 are the first again, and three are excluded."""
    random = np.random.default_rng(6)
    vectors = unit(unit(random.normal(size=(2000, 64))).astype(np.float16).astype(np.float64))
    vectors = np.vstack([vectors, vectors[:500]])
    write_index(tmp_path / "index", vectors, [""] * 2500)
    query = unit(random.normal(size=64))
    hits = list(clip_index.query_index(tmp_path / "index", query, duplicate_similarity=0.99, exclude=vectors[600:603]))
    assert sorted(hit.row % 2000 for hit in hits) == [row for row in range(2000) if row not in (600, 601, 602)]


def test_captions_take_their_share_in_the_ranking(tmp_path):
    random = np.random.default_rng(5)
    vectors, captions = (unit(unit(random.normal(size=(50, 16))).astype(np.float16)) for _ in range(2))
    query = unit(random.normal(size=16))
    write_index(tmp_path / "index", vectors, [str(number) for number in range(50)])

    def embed(texts):
        return captions[[int(text.removeprefix("about ")) for text in texts]]

    for weight in (0.0, 0.3, 1.0):
        hits = list(
            clip_index.query_index(
                tmp_path / "index", query, duplicate_similarity=2, caption_weight=weight, embed=embed
            )
        )
        score = (1 - weight) * (vectors.astype(np.float64) @ query) + weight * (captions.astype(np.float64) @ query)
        assert [hit.row for hit in hits] == np.argsort(-score).tolist()
        assert np.allclose([hit.similarity for hit in hits], [vectors[hit.row] @ query for hit in hits], atol=1e-3)


def test_a_query_of_another_clip_is_refused(tmp_path):
    write_index(tmp_path / "index", unit(np.eye(4)), ["a"] * 4)
    with pytest.raises(UserError, match=r"^retrieve\.index\.clip: .* 8 .* 4"):
        list(clip_index.query_index(tmp_path / "index", unit(np.ones(8)), duplicate_similarity=0.9))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of random weights, whose text model is smaller than OpenAI's in every way."""
    import torch

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(folder / "source")
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def flat_colors(count: int) -> list[Image.Image]:
    """Images that a random CLIP tells apart: large blocks of color."""
    random = np.random.default_rng(8)
    return [
        Image.fromarray(np.kron(random.integers(0, 255, (2, 2, 3)), np.ones((12, 12, 1))).astype(np.uint8))
        for _ in range(count)
    ]


def write_tar(path: Path, images: list[Image.Image]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            for suffix, data in (("png", encoded(image)), ("txt", f"caption\n{number}".encode())):
                info = tarfile.TarInfo(f"./{number:03}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_a_pool_is_read_from_a_folder_tars_in_it_or_one_tar(tmp_path):
    colors = flat_colors(4)
    folder = tmp_path / "pool"
    (folder / "sub").mkdir(parents=True)
    write_tar(folder / "shard-0.tar", colors[:2])
    for name, image in (("a.png", colors[2]), ("sub/b.png", colors[3])):
        image.save(folder / name)
    (folder / "a.txt").write_text("an a")
    (folder / "README.md").write_text("about")
    found = [(item.name, item.caption) for item in clip_index.pool_images(folder)]
    tar = [("shard-0.tar/000.png", "caption 0"), ("shard-0.tar/001.png", "caption 1")]
    assert found == [("a.png", "an a"), ("sub/b.png", None), *tar]
    assert [(item.name, item.caption) for item in clip_index.pool_images(folder / "shard-0.tar")] == tar
    wanted = {"sub/b.png", "shard-0.tar/001.png"}
    some = {item.name: item.data for item in clip_index.pool_images(folder, wanted)}
    assert some.keys() == wanted
    assert (np.asarray(Image.open(io.BytesIO(some["shard-0.tar/001.png"]))) == np.asarray(colors[1])).all()


def test_names_that_are_not_utf_8_are_found_again(tmp_path):
    raw = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "pool").mkdir()
    flat_colors(1)[0].save(tmp_path / "pool" / raw)
    with tarfile.open(tmp_path / "pool/a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "pool" / raw, raw)
    names = [item.name for item in clip_index.pool_images(tmp_path / "pool")]
    assert [name.encode() for name in names]  # they can be written
    for name in names:
        assert [item.name for item in clip_index.pool_images(tmp_path / "pool", {name})] == [name]


def test_the_index_gives_class_images_by_cosine_without_the_instance_images(tmp_path, clip_folder):
    colors = flat_colors(12)
    (tmp_path / "instances").mkdir()
    colors[3].resize((48, 48), Image.Resampling.NEAREST).save(tmp_path / "instances/000.png")  # other pixels, same view
    tar = write_tar(tmp_path / "pool.tar", colors)
    clip = Clip.load(clip_folder)
    names = [f"pool.tar/{number:03}.png" for number in range(12)]
    vectors = clip.images(colors)
    write_index(tmp_path / "index", vectors, names)
    threshold = 0.999
    query = {
        "backend": "index",
        "duplicate_similarity": threshold,
        "index": {"pool": str(tar), "clip": str(clip_folder)},
    }
    result = retrieve(tmp_path, settings(query))
    exact = vectors.astype(np.float16).astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    vector = class_images.query_vector(clip, "cat").astype(np.float64)
    own = clip.images([Image.open(tmp_path / "instances/000.png")]).astype(np.float64)
    expected = brute_force(exact, vector, threshold, own)[:4]
    assert 3 not in brute_force(exact, vector, threshold, own)  # the test would prove nothing if it were far down
    rows = layout(tmp_path / "out")
    assert [(caption, url) for _, caption, url in rows] == [(f"about {names[row]}", names[row]) for row in expected]
    assert [entry["similarity"] for entry in result.kept] == pytest.approx(
        [exact[r] @ vector for r in expected], abs=1e-5
    )
    for row, (file, _, _) in zip(expected, rows, strict=True):
        assert (np.asarray(Image.open(tmp_path / "out" / file)) == np.asarray(colors[row])).all()


def test_the_query_is_the_mean_direction_of_its_templates(clip_folder, monkeypatch):
    clip = Clip.load(clip_folder)
    monkeypatch.setattr(class_images, "QUERY_TEMPLATES", ("{}", "photo of a {}"))
    both = clip.text(["cat", "photo of a cat"])
    assert np.allclose(class_images.query_vector(clip, "cat"), unit(both.sum(axis=0)), atol=1e-6)


# clip-retrieval itself


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_tool_is_found_or_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.delenv(clip_tool.VARIABLE, raising=False)
    monkeypatch.setattr(clip_tool, "__file__", str(tmp_path / "customdiff/retrieval/clip_tool.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"uv venv .* && uv pip install .* -r requirements/clip-retrieval.txt"):
        clip_tool.command(tmp_path)
    on_path = executable(tmp_path / "bin/clip-retrieval", "exit 0")
    assert clip_tool.command(tmp_path) == [str(on_path)]
    own = executable(tmp_path / ".venv-clip-retrieval/bin/clip-retrieval", "exit 0")
    assert clip_tool.command(tmp_path) == [str(own)]
    monkeypatch.setenv(clip_tool.VARIABLE, f"{on_path} -n")
    assert clip_tool.command(tmp_path) == [str(on_path), "-n"]
    monkeypatch.setenv(clip_tool.VARIABLE, "no-such-program")
    with pytest.raises(UserError, match=rf"^{clip_tool.VARIABLE}: no-such-program"):
        clip_tool.command(tmp_path)


def test_a_tool_that_fails_is_one_line_and_leaves_no_index(tmp_path, monkeypatch, clip_folder):
    program = executable(tmp_path / "tool", "echo some chatter\necho 'RuntimeError: no memory' >&2\nexit 3")
    monkeypatch.setenv(clip_tool.VARIABLE, str(program))
    tar = write_tar(tmp_path / "pool.tar", flat_colors(2))
    with pytest.raises(UserError, match=r"clip-retrieval inference.worker.* 3\): RuntimeError: no memory$"):
        clip_index.build_index(tar, str(clip_folder), tmp_path / "index")
    assert not list(tmp_path.glob("index*"))


@pytest.mark.slow
def test_clip_retrieval_itself_embeds_and_indexes_a_pool(tmp_path, clip_folder):
    """Its embeddings against our own CLIP; and what we keep of them is what its own commands take."""
    colors = flat_colors(20)
    folder = tmp_path / "pool"
    folder.mkdir()
    write_tar(folder / "shard.tar", colors[:15])
    for number, image in enumerate(colors[15:]):
        image.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"broken")
    result = clip_index.build_index(folder, str(clip_folder), tmp_path / "index")
    assert result.count == 20
    assert [refused.name for refused in result.set_aside] == ["broken.png"]
    rows = json.loads((tmp_path / "index/rows.json").read_text())
    images = {
        item.name: Image.open(io.BytesIO(item.data))
        for item in clip_index.pool_images(folder)
        if item.data != b"broken"
    }
    assert {row["name"] for row in rows} == images.keys()
    assert next(row["caption"] for row in rows if row["name"] == "shard.tar/007.png") == "caption 7"
    clip = Clip.load(clip_folder)
    vectors = clip.images([images[row["name"]] for row in rows])
    embeddings = np.load(tmp_path / "index" / clip_index.EMBEDDINGS).astype(np.float32)
    assert ((vectors * embeddings).sum(axis=1) > 0.999).all()
    query = clip.text(["cat"])[0]
    hits = list(clip_index.query_index(tmp_path / "index", query, duplicate_similarity=2.0))
    exact = unit(embeddings)
    assert [hit.row for hit in hits[:10]] == brute_force(exact, query, 2.0, [])[:10]
    settled = {"backend": "index", "index": {"pool": str(folder), "clip": str(clip_folder)}}
    noisy_images(tmp_path / "instances", 2, seed=99)
    retrieve(tmp_path, settings(settled))
    assert len(layout(tmp_path / "out")) == 4
    clip_tool.run(clip_tool.command(), ["index", "--embeddings_folder=index", "--index_folder=served"], tmp_path)
    assert {path.name for path in (tmp_path / "served").iterdir()} >= {"image.index", "metadata"}


# service


class KnnService(BaseHTTPRequestHandler):
    """Speaks the protocol of `clip-retrieval back` 2.45.0: POST knn-service, GET indices-list, and serves images."""

    def log_message(self, *_):
        pass

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.queries.append(query)
        if self.server.failures:
            self.send(self.server.failures.pop(0), b"down")
        elif query["indice_name"] != "mine":  # the real service raises a KeyError here, which Flask answers with 500
            self.send(500, b"")
        else:
            self.send(200, json.dumps(self.server.answers[: query["num_images"]]).encode())

    def do_GET(self):
        if self.path == "/indices-list":
            self.send(200, b'["mine", "yours"]')
        else:
            self.send(*self.server.files[self.path])


@pytest.fixture
def knn():
    server = ThreadingHTTPServer(("127.0.0.1", 0), KnnService)
    server.queries, server.failures, server.answers, server.files = [], [], [], {}
    server.home = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def serve_images(knn, count, **special):
    """Images 0.png, 1.png, ... of falling similarity; `special` replaces what a file is answered with."""
    for number in range(count):
        knn.files[f"/{number}.png"] = special.get(f"n{number}", (200, encoded(noise(number))))
        answer = {"url": f"{knn.home}/{number}.png", "caption": f"cat\n{number}", "id": number}
        knn.answers.append(answer | {"similarity": 0.5 - number / 100})


def asking(knn, **changes) -> Params:
    section = {"url": f"{knn.home}/knn-service", "index_name": "mine", "retries": 2, "timeout": 5} | changes
    return settings({"backend": "service", "service": section})


def test_a_service_is_asked_in_the_words_of_clip_client_and_its_images_come_in_order(tmp_path, instances, knn):
    gone, page = (404, b""), (200, b"<html>")
    refused = (200, encoded(noise(3)), [("X-Robots-Tag", "NoAI, noimageai")])
    serve_images(knn, 30, n0=gone, n2=page, n3=refused)
    result = retrieve(tmp_path, asking(knn))
    urls = [f"{knn.home}/{number}.png" for number in (1, 4, 5)]
    assert [(caption, url) for _, caption, url in layout(tmp_path / "out")][:3] == [
        (f"cat {number}", url) for number, url in zip((1, 4, 5), urls, strict=True)
    ]
    assert [entry["similarity"] for entry in result.kept] == pytest.approx([0.49, 0.46, 0.45, 0.44])
    # the fields that ClipClient.__search_knn_api__ sends, and the reference's over-fetching by 1.5
    fields = "text image image_url embedding_input deduplicate use_safety_model use_violence_detector indice_name"
    fields += " use_mclip aesthetic_score aesthetic_weight modality num_images num_result_ids"
    assert knn.queries[0].keys() == set(fields.split())
    assert knn.queries[0] | {"text": "cat", "indice_name": "mine", "modality": "image"} == knn.queries[0]
    assert [query["num_images"] for query in knn.queries] == [6, 9]
    reasons = " | ".join(refused.reason for refused in result.set_aside)
    assert "404 Not Found" in reasons
    assert "web page" in reasons
    assert "X-Robots-Tag" in reasons


def test_images_may_come_inside_the_answer(tmp_path, instances, knn):
    """As `clip-retrieval back` answers for an index of local files."""
    for number in range(4):
        image = base64.b64encode(encoded(noise(number), "JPEG")).decode()
        knn.answers.append(
            {"image_path": f"/there/{number}.jpg", "image": image, "caption": "", "id": number, "similarity": 0.3}
        )
    knn.answers.insert(1, {"image_path": "/there/x.jpg", "image": "not base64!", "id": 8, "similarity": 0.3})
    knn.answers.insert(2, {"id": 9, "similarity": 0.3})  # beyond num_images the real service leaves the rest out
    result = retrieve(tmp_path, asking(knn))
    rows = layout(tmp_path / "out")
    assert [url for _, _, url in rows] == [f"/there/{number}.jpg" for number in range(4)]
    assert {caption for _, caption, _ in rows} == {"cat"}
    assert rows[0][0] == "images/000000.jpg"
    assert {refused.name: refused.reason for refused in result.set_aside} == {
        "/there/x.jpg": "invalid base64",
        "9": "has neither an address nor an image",
    }


def test_an_index_that_is_exhausted_ends_the_asking(tmp_path, instances, knn):
    serve_images(knn, 3)
    result = retrieve(tmp_path, asking(knn))
    assert len(result.kept) == 3
    assert len(knn.queries) == 2
    assert "3 class images found" in result.notes[0]


def test_private_addresses_of_other_hosts_are_not_fetched(tmp_path, instances, knn):
    serve_images(knn, 3)
    port = knn.home.rpartition(":")[2]
    for host in ("localhost", "127.0.0.2", "[::1]", "169.254.169.254"):
        knn.answers.insert(0, {"url": f"http://{host}:{port}/0.png", "caption": "", "id": 7, "similarity": 1.0})
    knn.answers.insert(0, {"url": "file:///etc/passwd", "caption": "", "id": 6, "similarity": 1.0})
    result = retrieve(tmp_path, asking(knn))
    assert len(result.kept) == 3
    assert sum("not a public address" in refused.reason for refused in result.set_aside) == 4
    assert "file://" in result.set_aside[0].reason


def test_a_service_that_stumbles_is_asked_again_with_growing_pauses(knn):
    serve_images(knn, 4)
    knn.failures = [503, 429]
    pauses = []
    section = Service(url=f"{knn.home}/knn-service", index_name="mine", retries=2)
    found = clip_service.service_images(section, "cat", 4, pause=pauses.append)
    assert next(found)[0].caption == "cat 0"
    found.close()
    assert pauses == [1.0, 2.0]


def test_a_dead_service_gets_one_line_that_says_what_to_use_instead(tmp_path, instances, knn):
    knn.failures = [404]
    with pytest.raises(UserError, match=r"^retrieve\.service\.url: .* 404 .*retrieve.backend: index or generate"):
        retrieve(tmp_path, asking(knn))
    assert len(knn.queries) == 1  # a wrong address is not retried
    with pytest.raises(UserError, match=r"^retrieve\.service\.index_name: .* other; .* mine, yours"):
        retrieve(tmp_path, asking(knn, index_name="other", retries=0))

    def refuse(request):
        raise httpx.ConnectError("Name or service not known")

    section = Service(url="https://knn.laion.ai/knn-service", retries=1)
    with pytest.raises(UserError, match=r"^retrieve\.service\.url: .*LAION"):
        next(
            clip_service.service_images(section, "cat", 4, transport=httpx.MockTransport(refuse), pause=lambda _: None)
        )
    page = httpx.MockTransport(lambda request: httpx.Response(200, content=b"<html>parked</html>"))
    with pytest.raises(UserError, match=r"^retrieve\.service\.url: "):
        next(clip_service.service_images(section, "cat", 4, transport=page))


def test_images_of_a_service_below_the_floor_are_not_downloaded(tmp_path, instances, knn):
    """Even numbers are captioned "cat"; of the others those from 0.46 on are kept; without a similarity none is."""
    serve_images(knn, 14)
    for number in range(1, 14, 2):
        knn.answers[number]["caption"] = "a hat" if number % 4 == 1 else ""
    knn.answers[3].pop("similarity")
    requested = []
    plain = KnnService.do_GET
    try:
        KnnService.do_GET = lambda self: (requested.append(self.path), plain(self))
        params = asking(knn)
        params = params.model_copy(
            update={"retrieve": params.retrieve.model_copy(update={"min_similarity": 0.46, "num_class_images": 8})}
        )
        result = retrieve(tmp_path, params)
    finally:
        KnnService.do_GET = plain
    expected = [0, 1, 2, 4, 6, 8, 10, 12]
    assert [url.rpartition("/")[2] for _, _, url in layout(tmp_path / "out")] == [f"{n}.png" for n in expected]
    assert sorted(requested) == sorted(f"/{number}.png" for number in expected)
    assert (result.captions_naming_class, result.captions) == (7, 8)


# the floor and the filling


CAPTIONS = ["a dog", "two dogs", "a cat", "hot dog stand", "a teapot", "", "a hotdog", "a penguin", "", "a cat"]


@pytest.fixture
def pool(tmp_path, clip_folder, instances):
    """A pool of ten images with `CAPTIONS`, its index, and settings that use it; and the cosines in float64."""
    colors = flat_colors(10)
    folder = tmp_path / "pool"
    folder.mkdir()
    for number, (image, caption) in enumerate(zip(colors, CAPTIONS, strict=True)):
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    clip = Clip.load(clip_folder)
    write_index(tmp_path / "index", clip.images(colors), [f"{number}.png" for number in range(10)])
    rows = [{"name": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (tmp_path / "index/rows.json").write_text(json.dumps(rows))
    stored = np.load(tmp_path / "index" / clip_index.EMBEDDINGS).astype(np.float64)
    cosines = unit(stored).astype(np.float64) @ class_images.query_vector(clip, "dog")

    def of(base: str = "none", **retrieve) -> Params:
        index = {"pool": str(folder), "clip": str(clip_folder)}
        wanted = {"backend": "index", "duplicate_similarity": 1.0, "num_class_images": 10, "index": index} | retrieve
        params = settings(wanted, base)
        concept = params.concepts["cat"].model_copy(update={"class_prompt": "dog"})
        return params.model_copy(update={"concepts": {"cat": concept}})

    return of, cosines


def sources(result: class_images.Retrieved) -> list[int]:
    return [int(entry["source"].removesuffix(".png")) for entry in result.kept]


@pytest.mark.parametrize("caption_weight", [0.0, 0.5])
def test_an_image_is_kept_if_its_caption_names_the_class_or_its_cosine_reaches_the_floor(
    tmp_path, pool, caption_weight
):
    of, cosines = pool
    by_cosine = np.argsort(-cosines)
    floor = float(cosines[by_cosine[4]] + cosines[by_cosine[5]]) / 2  # five of ten reach it
    result = retrieve(tmp_path, of(min_similarity=max(0.0, floor), caption_weight=caption_weight))
    named = {0, 1, 3}
    expected = named | {row for row in range(10) if cosines[row] >= max(0.0, floor)}
    assert named < expected < set(range(10))  # neither route alone keeps these
    assert set(sources(result)) == expected
    if not caption_weight:
        assert sources(result) == [row for row in by_cosine if row in expected]
    similarities = {int(e["source"].removesuffix(".png")): e["similarity"] for e in result.kept}
    assert similarities == pytest.approx({row: cosines[row] for row in expected}, abs=1e-4)


def test_a_run_says_how_many_captions_name_the_class(tmp_path, pool):
    of, _ = pool
    result = retrieve(tmp_path, of())
    assert "3 of 8 captions name 'dog', 2 images without a caption" in result.origin
    (warning,) = [note for note in result.notes if "captions name" in note]
    assert "retrieve.min_similarity" in warning
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    counts = {"class_prompt": "dog", "captions": 8, "captions_naming_class": 3, "generated": 0}
    assert {name: value for name, value in manifest.items() if name != "images"} == counts
    assert [caption for _, caption, url in layout(tmp_path / "out") if url in ("5.png", "8.png")] == ["dog", "dog"]
    floored = retrieve(tmp_path, of(min_similarity=1.0))
    assert floored.origin == "3 of 3 captions name 'dog'"
    (note,) = floored.notes  # fewer than requested, and no warning about captions
    assert "retrieve.fill: generate" in note


def test_too_few_above_the_floor_name_the_floor(tmp_path, pool):
    of, _ = pool
    with pytest.raises(UserError, match=r"3 class images .*retrieve\.min_similarity: 1.* retrieve\.minimum is 4; "):
        retrieve(tmp_path, of(min_similarity=1.0, minimum=4))
    assert not list(tmp_path.glob("out*"))


def test_the_base_model_generates_what_is_missing(tmp_path, pool, tiny_base):
    of, _ = pool
    generate = {"steps": 2, "guidance_scale": 1.5, "batch_size": 3}
    options = {"min_similarity": 1.0, "minimum": 6, "num_class_images": 6, "generate": generate}
    with pytest.raises(UserError, match=r"retrieve\.fill: generate"):
        retrieve(tmp_path, of(str(tiny_base), **options))
    result = retrieve(tmp_path, of(str(tiny_base), fill="generate", **options))
    rows = layout(tmp_path / "out")
    assert sorted(url for _, _, url in rows[:3]) == ["0.png", "1.png", "3.png"]
    assert [caption for _, caption, _ in rows[3:]] == ["dog"] * 3
    assert [entry["similarity"] for entry in result.kept[3:]] == [None] * 3
    assert result.origin == "3 of 3 captions name 'dog', 3 images generated from 'dog'"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["generated"] == 3
    drawn = retrieve(tmp_path, of(str(tiny_base), backend="generate", num_class_images=3, generate=generate))
    assert [entry["sha256"] for entry in drawn.kept] == [entry["sha256"] for entry in result.kept[3:]]


def test_the_base_model_is_not_loaded_if_nothing_is_missing(tmp_path, pool):
    of, _ = pool
    result = retrieve(tmp_path, of("no-such-model", fill="generate", min_similarity=1.0, num_class_images=3))
    assert len(result.kept) == 3
