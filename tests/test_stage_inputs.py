"""Inputs of stages that depend on other parameters: masks, the masked loss, and how class images are found."""

import os

import pytest
import yaml
from conftest import concept_values
from PIL import Image
from typer.testing import CliRunner

from customdiff import cli, stage_inputs
from customdiff.config import Params
from customdiff.errors import UserError
from stages import inputs as inputs_stage


@pytest.fixture
def inputs(tmp_path):
    """Inputs of `prepare` and `train` for sections `prepare` and `train`."""
    segmenter = tmp_path / "segmenter"
    segmenter.mkdir()
    (segmenter / "config.json").write_text("{}")

    def of(prepare=None, train=None):
        values = {
            "concepts": {"cat": concept_values()},
            "prepare": {"segmenter": str(segmenter)} | (prepare or {}),
            "train": train or {},
        }
        params = Params.model_validate(values)
        hashes = stage_inputs.FileHashes(tmp_path / "hashes.json")
        return stage_inputs.prepare(params, "cat", hashes), stage_inputs.train(params, hashes)

    of.segmenter = segmenter
    return of


def test_prepare_depends_on_the_segmenter_if_masks_are_used(inputs):
    before, _ = inputs()
    without, _ = inputs({"masks": "none"})
    assert list(before["segmenter"]) == [str(inputs.segmenter)]
    assert without["segmenter"] == {}
    (inputs.segmenter / "config.json").write_text("{ }")
    assert inputs()[0]["segmenter"] != before["segmenter"]
    assert inputs({"masks": "none"})[0] == without
    named, _ = inputs({"masks": str(inputs.segmenter), "segmenter": "elsewhere"})
    assert list(named["segmenter"]) == [str(inputs.segmenter)]


def test_the_masked_loss_is_an_input_of_train_and_its_use_one_of_prepare(inputs):
    plain, half, quarter = (inputs(train={"mask_weight": weight}) for weight in (1.0, 0.5, 0.25))
    assert plain[0] != half[0] == quarter[0]
    assert plain[1] != half[1] != quarter[1]


def test_the_words_of_other_concepts_are_an_input_of_prepare_if_it_shows_them(tmp_path):
    def of(word, together):
        concepts = {"cat": concept_values(), "pot": concept_values("<new2>", word)}
        params = Params.model_validate({"concepts": concepts, "prepare": {"together": together}})
        return stage_inputs.prepare(params, "cat", stage_inputs.FileHashes(tmp_path / "hashes.json"))

    assert of("pot", 1) != of("jug", 1)
    assert of("pot", 0) == of("jug", 0)


def test_a_token_that_no_concept_has_stops_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"concepts": {"cat": concept_values()}, "evaluate": {"prompts": "prompts"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {} beside a <new2> pot\n")
    with pytest.raises(UserError, match=r"default\.txt: line 1: names <new2>"):
        inputs_stage.main()
    assert not (tmp_path / "data").exists()
    (tmp_path / "prompts/default.txt").write_text("a {} beside a <new1> cat\n")
    inputs_stage.main()
    assert (tmp_path / "data/inputs/evaluate.json").is_file()


@pytest.fixture
def retrieve_inputs(tmp_path):
    """Inputs of `retrieve-class-images` for a section `retrieve`; all paths exist."""
    for name in ("base", "clip", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def of(seed=42, **retrieve):
        values = {
            "base": {"model": str(tmp_path / "base"), "seed": seed},
            "concepts": {"cat": concept_values()},
            "retrieve": {"index": {"clip": str(tmp_path / "clip")}, "folder": str(tmp_path / "mine")} | retrieve,
        }
        hashes = stage_inputs.FileHashes(tmp_path / "hashes.json")
        return stage_inputs.retrieve_class_images(Params.model_validate(values), "cat", hashes)

    return of


@pytest.mark.parametrize("backend", ["index", "service", "folder"])
def test_class_images_depend_on_the_base_model_if_it_fills_up(retrieve_inputs, backend):
    none, steps = {"backend": backend}, {"generate": {"steps": 3}}
    assert retrieve_inputs(1, **none, **steps) == retrieve_inputs(**none)
    filled = retrieve_inputs(**none, fill="generate")
    assert filled["base files"] != {}
    assert filled != retrieve_inputs(1, **none, fill="generate")
    assert filled != retrieve_inputs(**none, fill="generate", **steps)
    assert filled.get("files") == retrieve_inputs(**none).get("files")


@pytest.mark.parametrize(
    ("backend", "change", "read"),
    [
        ("index", {"min_similarity": 0.5}, True),
        ("service", {"min_similarity": 0.5}, True),
        ("folder", {"min_similarity": 0.5}, False),
        ("generate", {"min_similarity": 0.5}, False),
        ("generate", {"fill": "generate"}, False),
    ],
)
def test_the_floor_is_an_input_where_it_is_read(retrieve_inputs, backend, change, read):
    assert (retrieve_inputs(backend=backend) != retrieve_inputs(backend=backend, **change)) is read


def test_a_holdout_of_one_photo_or_of_a_photo_that_is_trained_on_stops_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {}\n")
    (tmp_path / "kept").mkdir()
    for name in ("1.txt", "1.mask.png"):
        (tmp_path / "kept" / name).write_text("")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "kept/1.png")
    (tmp_path / "photos").mkdir()
    concept = concept_values() | {"holdout": "kept", "source": {"path": "photos"}}
    values = {"concepts": {"cat": concept}, "evaluate": {"prompts": "prompts"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"concepts\.cat\.holdout: kept has 1 photos"):
        inputs_stage.main()
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "kept/2.jpg")
    inputs_stage.main()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "photos/same.bmp")
    with pytest.raises(UserError, match=r"concepts\.cat\.holdout: kept/1\.png .*same\.bmp"):
        inputs_stage.main()
    with pytest.raises(UserError, match=r"concepts\.cat\.holdout: kept/1\.png .*same\.bmp"):
        CliRunner().invoke(cli.commands, ["check"], catch_exceptions=False)


@pytest.fixture
def evaluate_inputs(tmp_path):
    """Inputs of `evaluate` and of `train`; the folders of models and photos exist."""
    for name in ("identity", "segmenter", "holdout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def of(holdout="holdout", prepare=None, **evaluate):
        values = {
            "concepts": {"cat": concept_values() | {"holdout": holdout and str(tmp_path / holdout)}},
            "prepare": {"segmenter": str(tmp_path / "segmenter")} | (prepare or {}),
            "evaluate": {"identity": str(tmp_path / "identity"), "prompts": "none", "clip": "none"} | evaluate,
        }
        hashes, params = stage_inputs.FileHashes(tmp_path / "hashes.json"), Params.model_validate(values)
        return stage_inputs.evaluate(params, hashes), stage_inputs.train(params, hashes)

    return of


@pytest.mark.parametrize("name", ["identity", "segmenter", "holdout"])
def test_evaluate_depends_on_the_files_of_its_models_and_photos_and_train_does_not(evaluate_inputs, tmp_path, name):
    before = evaluate_inputs()
    (tmp_path / name / "file").write_text("changed")
    after = evaluate_inputs()
    assert after[0]["files"] != before[0]["files"]
    assert after[1] == before[1]


def test_what_evaluate_does_not_use_is_none_of_its_files(evaluate_inputs, tmp_path):
    def used(**changes):
        return {name.rpartition("/")[2] for name in evaluate_inputs(**changes)[0]["files"]}

    assert used() == {"identity", "segmenter", "holdout"}
    assert used(masked=False, identity=None, holdout=None) == set()
    assert used(prepare={"masks": "none"}) == {"identity", "holdout"}
    assert used(prepare={"masks": "none"}, masked=True) == {"identity", "segmenter", "holdout"}


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"max_steps": 7}),
        ("train", {"learning_rate": 1e-3}),
        ("train", {"with_prior_preservation": False}),
        ("train", {"prior_loss_weight": 0.5}),
        ("prepare", {"masks": "none"}),
        ("prepare", {"segmenter": "CIDAS/clipseg-rd64-refined"}),
        ("prepare", {"captions": "template"}),
        ("prepare", {"backgrounds": {"share": 0.5}}),
    ],
)
def test_what_the_figures_and_the_next_step_depend_on_is_an_input_of_evaluate(tmp_path, section, change):
    def inputs(**sections):
        params = Params.model_validate({"concepts": {"cat": concept_values()}, **sections})
        return stage_inputs.evaluate(params, stage_inputs.FileHashes(tmp_path / "hashes.json"))

    assert inputs(**{section: change}) != inputs()
    assert inputs(train={"adam_beta1": 0.8}, prepare={"views": 3}) == inputs()


def test_no_secret_of_an_address_is_an_input(tmp_path):
    """DVC stores the inputs in its cache and pushes them to its remotes."""
    address = "https://bob:S3cr3t@host.org/a.zip?token=S3cr3t"
    values = {
        "concepts": {"cat": concept_values() | {"source": {"url": address}}},
        "retrieve": {"backend": "service", "service": {"url": address}},
    }
    paths = stage_inputs.write_inputs(Params.model_validate(values), tmp_path / "inputs")
    text = "".join(path.read_text() for path in paths)
    assert "S3cr3t" not in text
    assert text.count("https://host.org/a.zip") == 2


def test_names_that_are_not_utf8_are_hashed(tmp_path):
    hashes = stage_inputs.FileHashes(tmp_path / "hashes.json")
    folder = os.fsencode(tmp_path) + b"/photos"
    os.mkdir(folder)
    open(folder + b"/\xff.png", "w").close()
    before = hashes.of(str(tmp_path / "photos"))
    os.rename(folder + b"/\xff.png", folder + b"/\xfe.png")
    assert hashes.of(str(tmp_path / "photos")) != before
    hashes.save()


def test_the_outputs_of_former_concepts_are_set_aside_and_come_back(tmp_path):
    """DVC hashes data/instances, data/classes and data/prepared as a whole: they hold what params.yaml names."""
    data = tmp_path / "data"
    for kind, manifest in stage_inputs.MANIFESTS.items():
        for name in ("cat", "dog"):
            path = data / kind / name / manifest
            path.parent.mkdir(parents=True)
            path.write_text(f"{kind} {name}")
    own = data / "instances/photos/a.png"  # of the user, not of a stage
    own.parent.mkdir()
    own.write_text("")
    stage_inputs.set_former_concepts_aside(["dog"], data)
    assert {path.name for path in (data / "prepared").iterdir()} == {"dog"}
    assert {path.name for path in (data / "instances").iterdir()} == {"dog", "photos"}
    assert (data / "former/classes/cat/manifest.json").read_text() == "classes cat"
    stage_inputs.set_former_concepts_aside(["cat", "dog"], data)
    assert (data / "prepared/cat/instance.json").read_text() == "prepared cat"
    assert not list((data / "former").rglob("*.json"))
    (data / "former/classes/dog").mkdir()
    stage_inputs.set_former_concepts_aside(["cat"], data)  # a newer one replaces an older one
    assert (data / "former/classes/dog/manifest.json").read_text() == "classes dog"


def test_the_first_stage_sets_former_concepts_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"concepts": {"cat": concept_values()}, "evaluate": {"prompts": "prompts"}})
    )
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {}\n")
    (tmp_path / "data/prepared/dog").mkdir(parents=True)
    (tmp_path / "data/prepared/dog/instance.json").write_text("{}")
    inputs_stage.main()
    assert not list((tmp_path / "data/prepared").iterdir())
    assert (tmp_path / "data/former/prepared/dog/instance.json").is_file()
