"""The benchmark reads the authors' layout, trains and scores what is missing, and prints our means under theirs."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import concept_values, noisy_images, random_adapter, tiny_params
from PIL import Image
from stand_ins import Judge, plain
from typer.testing import CliRunner

from customdiff import cli
from customdiff.errors import UserError
from customdiff.evaluation import customconcept101 as benchmark
from customdiff.evaluation.judges import Judges
from customdiff.models.clip import Clip
from customdiff.models.vision import VisionEncoder


def item(name, token, class_prompt, **more):
    return {
        "instance_prompt": f"photo of a {token} {class_prompt}",
        "class_prompt": class_prompt,
        "instance_data_dir": f"./benchmark_dataset/{name}",
        "class_data_dir": f"./regularization/{name}",
        "prompt_filename": f"prompts/{class_prompt}.txt",
    } | more


@pytest.fixture
def data(tmp_path):
    """A data set of two concepts and the pair of them, laid out as the authors'."""
    folder = tmp_path / "customconcept101"
    for seed, name in enumerate(("pet_cat1", "things_cup2")):
        noisy_images(folder / "benchmark_dataset" / name, 2, seed=seed)
    noisy_images(folder / "regularization/pet_cat1", 3, seed=7)
    (folder / "prompts").mkdir()
    (folder / "prompts/cat.txt").write_text("Photo of a {}.\n{} in times square.\n")
    (folder / "prompts/cup.txt").write_text("A {} on red. \n\n")
    (folder / "prompts/pet_things.txt").write_text("The {1} beside a {0}.\n{0} with {0}")
    single = [item("pet_cat1", "<new1>", "cat"), item("things_cup2", "<new1>", "cup")]
    joint = [[item("pet_cat1", "<new1>", "cat"), item("things_cup2", "<new2>", "cup")]]
    joint[0].append({"prompt_filename_compose": "prompts/pet_things.txt"})
    (folder / "dataset.json").write_text(json.dumps(single))
    (folder / "dataset_multiconcept.json").write_text(json.dumps(joint))
    return folder


def test_the_layout_of_the_authors_is_read(data):
    cat, cup, pair = benchmark.read(data)
    assert [(each.key, each.kind) for each in (cat, cup, pair)] == [
        ("pet_cat1", "single"),
        ("things_cup2", "single"),
        ("pet_cat1+things_cup2", "joint"),
    ]
    assert [prompt.template for prompt in cat.prompts] == ["Photo of a {}.", "{} in times square."]
    assert cat.prompts[1].fill("<new1> cat") == "<new1> cat in times square."
    assert pair.prompts[0].fill("<new1> cat", "<new2> cup") == "The <new2> cup beside a <new1> cat."
    assert pair.prompts[1].fill("<new1> cat", "<new2> cup") == "<new1> cat with <new1> cat", "as in scene_pet.txt"
    assert cat.concepts["pet_cat1"].caption == "photo of a <new1> cat"
    assert (cat.class_images["pet_cat1"].name, cup.class_images["things_cup2"]) == ("pet_cat1", None)


def test_a_data_set_without_pairs_has_its_single_concepts(data):
    (data / "dataset_multiconcept.json").unlink()
    assert [entry.key for entry in benchmark.read(data)] == ["pet_cat1", "things_cup2"]


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("dataset.json", "{}", r"dataset\.json: must be a list"),
        ("dataset.json", "[", r"dataset\.json: cannot be read"),
        (
            "dataset.json",
            '[{"prompt_filename": "prompts/cat.txt"}]',
            r"dataset\.json: an entry needs instance_data_dir",
        ),
        ("dataset.json", '["cat"]', r"dataset\.json: an entry lacks prompt_filename"),
        ("dataset_multiconcept.json", "[[]]", r"dataset_multiconcept\.json: an entry lacks prompt_filename_compose"),
        ("prompts/cat.txt", "a cat\n", r"cat\.txt: 'a cat' lacks a placeholder"),
        ("prompts/cat.txt", "", r"cat\.txt: has no prompts"),
        ("prompts/pet_things.txt", "both", r"pet_things\.txt: 'both' lacks a placeholder"),
    ],
)
def test_a_file_of_another_form_is_named(data, file, text, named):
    (data / file).write_text(text)
    with pytest.raises(UserError, match=named) as error:
        benchmark.read(data)
    assert "\n" not in str(error.value)


def test_missing_photos_and_two_concepts_of_one_token_are_named(data):
    joint = json.loads((data / "dataset_multiconcept.json").read_text())
    joint[0][1]["instance_prompt"] = "photo of a <new1> cup"
    (data / "dataset_multiconcept.json").write_text(json.dumps(joint))
    with pytest.raises(UserError, match=r"pet_cat1\+things_cup2: .*token"):
        benchmark.read(data)
    for path in (data / "benchmark_dataset/pet_cat1").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"pet_cat1: has no photos .*benchmark_dataset\.zip"):
        benchmark.read(data)


def test_the_protocol_replaces_evaluate_and_a_pair_trains_for_twice_the_steps(data, tiny_base):
    params = benchmark.protocol(tiny_params(tiny_base, max_steps=250))
    found = params.evaluate
    assert (found.scheduler, found.eta, found.steps, found.guidance_scale) == ("ddim", 1.0, 200, 6.0)
    assert (found.clip, found.identity) == ("openai/clip-vit-base-patch32", "facebook/dino-vits16")
    entries = benchmark.read(data)
    assert [benchmark.params_of(params, entry).train.max_steps for entry in entries] == [250, 250, 500]
    assert list(benchmark.params_of(params, entries[2]).concepts) == ["pet_cat1", "things_cup2"]


def test_a_pair_is_prepared_with_views_beside_the_other_concept(data, tiny_base, tmp_path, monkeypatch):
    others = {}
    monkeypatch.setattr(
        benchmark, "prepare_concept", lambda _, name, **folders: others.update({name: folders["others"]})
    )
    monkeypatch.setattr(benchmark.trainer, "run", lambda *_: SimpleNamespace(copy_results=lambda *_: None))
    params = tiny_params(tiny_base, with_prior_preservation=False)
    pair = benchmark.read(data)[2]
    benchmark.learn(benchmark.params_of(params, pair), pair, tmp_path, tmp_path, tmp_path)
    photos = tmp_path / "instances"
    assert others == {
        "pet_cat1": {"things_cup2": photos / "things_cup2"},
        "things_cup2": {"pet_cat1": photos / "pet_cat1"},
    }


def test_dino_is_given_the_center_of_an_image():
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste("red", (18, 2, 46, 30))  # 224 px of the middle, once the shorter side has 256
    crop = benchmark.dino_crop(wide)
    assert crop.size == (224, 224)
    assert np.asarray(crop)[20:-20, 20:-20].min(axis=(0, 1)).tolist() == [255, 0, 0]
    assert np.asarray(benchmark.dino_crop(Image.new("RGB", (100, 300)))).shape == (224, 224, 3)


def test_the_table_has_our_means_under_the_papers(data):
    entries = benchmark.read(data)
    scores = {
        "pet_cat1": dict(zip(benchmark.METRICS, (0.5, 0.6, 0.2), strict=True)),
        "things_cup2": dict(zip(benchmark.METRICS, (0.7, 0.8, 0.4), strict=True)),
        "pet_cat1+things_cup2": dict(zip(benchmark.METRICS, (0.1, 0.2, 0.3), strict=True)),
    }
    lines = benchmark.table(entries, scores, 200).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]
    assert rows == [
        ["101", "0.7602", "0.7440", "0.5311"],
        ["2", "0.6000", "0.7000", "0.3000"],
        ["101", "0.7567", "0.6680", "0.3760"],
        ["1", "0.1000", "0.2000", "0.3000"],
    ]
    assert "0.7583 | 0.7456 | 0.5335" in benchmark.table(entries, scores, 50)
    del scores["pet_cat1+things_cup2"]
    assert len(benchmark.table(entries, scores, 25).splitlines()) == 3, "no row of the paper has 25 steps"


@pytest.fixture
def project(data, tiny_base, tmp_path, monkeypatch):
    """A folder to run the command in, with tiny models; a call runs it."""
    monkeypatch.chdir(tmp_path)
    values = tiny_params(tiny_base, prepare={"captions": "template", "masks": "none"}, max_steps=2).model_dump()
    values["retrieve"] |= {"num_class_images": 2, "minimum": 2}
    values["retrieve"]["generate"]["steps"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))

    def run(*arguments):
        sampling = ["--data", str(data), "--steps", "2", "--num-images", "2", *arguments]
        return CliRunner().invoke(cli.commands, ["benchmark", "customconcept101", *sampling], catch_exceptions=False)

    return run


def cosines(first, second):
    return np.array([[sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) for b in second] for a in first])


def test_all_is_trained_and_scored_and_nothing_is_done_twice(project, data, tmp_path, pytestconfig):
    judges = [f"--{name}={pytestconfig.rootpath / 'data' / folder}" for name, folder in JUDGES.items()]
    done = project(*judges)
    out = tmp_path / "results/customconcept101"
    assert done.output.strip().endswith((out / "table.md").read_text().strip())
    results = json.loads((out / "results.json").read_text())
    assert (results["customdiff"]["single"]["number"], results["customdiff"]["joint"]["number"]) == (2, 1)
    with open(out / "scores.csv", newline="") as file:
        rows = {row["adapter"]: row for row in csv.DictReader(file)}
    clip = Clip.load(pytestconfig.rootpath / "data/judge")
    dino = VisionEncoder.load(pytestconfig.rootpath / "data/identity")
    for key, row in rows.items():  # from the files that the authors' script reads
        texts = json.loads((out / "scores" / key / "prompts.json").read_text())
        images = [Image.open(out / f"scores/{key}/samples/{name}.png") for name in texts]
        assert not any("<new" in text for text in texts.values())
        photos = [
            [Image.open(path) for path in (data / "benchmark_dataset" / name).iterdir()] for name in key.split("+")
        ]
        text = 2.5 * np.maximum(np.diag(cosines(clip.images(images), clip.text(list(texts.values())))), 0).mean()
        image = np.mean([cosines(clip.images(images), clip.images(own)).mean() for own in photos])
        crops = [benchmark.dino_crop(each) for each in images]
        by_dino = [cosines(dino.images(crops), dino.images([benchmark.dino_crop(p) for p in own])) for own in photos]
        expected = (text, image, np.mean([each.mean() for each in by_dino]))
        assert [float(row[name]) for name in benchmark.METRICS] == pytest.approx(expected, abs=1e-5)
    assert len(list((out / "class-images").iterdir())) == 2, "the pair has the class images of its concepts"
    assert not any((out / "work").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (out / "adapters").rglob("*") if path.is_file()}
    (out / "scores/pet_cat1/scores.json").unlink()
    again = project(*judges, "--adapters", str(out / "adapters"), "--out", "again", "--concepts", "things_cup2")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again/results.json").read_text())["customdiff"]["single"] == pytest.approx(
        {name: float(rows["things_cup2"][name]) for name in benchmark.METRICS} | {"number": 1}, abs=1e-5
    )
    weights = {path: path.read_bytes() for path in before}
    assert project(*judges).exit_code == 0
    touched = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched == {"pet_cat1"}
    assert weights == {path: path.read_bytes() for path in before}, "the same training gives the same adapter"


JUDGES = {"clip": "judge", "dino": "identity"}


@pytest.fixture
def judged(monkeypatch):
    monkeypatch.setattr(Judges, "load", lambda _: Judges(Judge(), Judge()))


def test_given_adapters_are_scored_under_their_own_names_and_others_left_out(project, tiny_base, tmp_path, judged):
    concepts = {"a": concept_values("<x>"), "b": concept_values("<y>", "cup")}
    random_adapter(tiny_base, tmp_path / "mine/pet_cat1+things_cup2", concepts=concepts)
    random_adapter(tiny_base, tmp_path / "mine/pet_cat1")
    project("--adapters", "mine")
    out = tmp_path / "results/customconcept101"
    assert {path.name for path in (out / "scores").iterdir()} == {"pet_cat1", "pet_cat1+things_cup2"}
    assert set(json.loads((out / "scores/pet_cat1+things_cup2/prompts.json").read_text()).values()) == {
        "The cup beside a cat.",
        "cat with cat",
    }
    assert not (out / "adapters").exists()
    written = (out / "scores/pet_cat1/samples/0000.png").stat().st_mtime_ns
    project("--adapters", "mine")
    assert (out / "scores/pet_cat1/samples/0000.png").stat().st_mtime_ns == written
    plain(9).save(tmp_path / "unused.png")
    project("--adapters", "mine", "--num-images", "1")
    assert len(list((out / "scores/pet_cat1/samples").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--adapters", "nowhere"], "--adapters: nowhere"),
        (["--concepts", "pet_cat9"], "--concepts: unknown 'pet_cat9'"),
        (["--adapters", "customconcept101"], "--adapters: customconcept101 has no folder .*pet_cat1"),
        (["--data", "nowhere"], r"nowhere/dataset\.json: cannot be read"),
        (["--out", "params.yaml"], "--out: params.yaml is a file"),
    ],
)
def test_a_mistake_is_named_in_one_line(project, judged, arguments, named):
    with pytest.raises(UserError, match=named) as error:
        project(*arguments)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_number_of_concepts_is_refused(project, tiny_base, tmp_path, judged):
    random_adapter(tiny_base, tmp_path / "mine/pet_cat1+things_cup2")
    with pytest.raises(UserError, match=r"number of concepts \(1\) than pet_cat1\+things_cup2 \(2\)"):
        project("--adapters", "mine")
