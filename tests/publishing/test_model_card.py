"""A model card tells what was learned and measured, as the Hub reads it, and nothing of the machine it was made on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from customdiff import cli
from customdiff.adapters import adapter
from customdiff.config import Base, Evaluate, Params
from customdiff.errors import UserError
from customdiff.evaluation import scores
from customdiff.models import attention, base
from customdiff.publishing import model_card

REPO = "anna/grey-cat"
CAT = {"modifier_token": "<new1>", "initializer": "cat", "class_prompt": "cat", "instance_prompt": "photo of a {} cat"}
DOG = {"modifier_token": "<new2>", "initializer": "dog", "class_prompt": "dog", "instance_prompt": "a {} dog"}
CARD = {
    "base": {"model": "owner/base", "revision": "v2", "variant": "fp16"},
    "concepts": {"cat": CAT},
    "method": "custom_diffusion",
    "freeze_model": "crossattn_kv",
    "lora_rank": 4,
    "resolution": 512,
    "steps": 250,
    "seed": 7,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "family": "Stable Diffusion 1.x",
    "processors": [],
    "fingerprint": [],
}
FIGURES = {
    "text_alignment": 1.25,
    "image_alignment": 0.5625,
    "base_text_alignment": 1.125,
    "base_image_alignment": 0.0625,
    "text_alignment_delta": 0.125,
    "image_alignment_delta": 0.5,
    "text_alignment_delta_ci95": [-0.0625, 0.25],
    "image_alignment_delta_ci95": [0.375, 0.625],
}


def page(card=CARD, **options):
    """The card as the Hub reads it: metadata and text."""
    made = ModelCard(model_card.make(REPO, card, license="apache-2.0", **options).content)
    return made.data.to_dict(), made.text


def write_results(folder, concepts=("cat",), prompts=("a {} on red", "a {} on grass"), **changes):
    """What `evaluate` leaves, written by the code of `evaluate` itself where it has any."""
    metrics = FIGURES | {
        "concepts": dict.fromkeys(concepts, FIGURES),
        "seconds": 3.0,
        "num_prompts": 2,
        "num_images": 4,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    pairs, rows = [], []
    for concept in concepts:
        for shade, prompt in enumerate(prompts):
            rows.append(dict.fromkeys(scores.COLUMNS, 0.5) | {"concept": concept, "prompt": prompt, "kind": "scene"})
            for number in range(2):
                image = Image.new("RGB", (8, 8), (50 * shade, 100 * number, 0))
                pairs.append(scores.Pair(concept, scores.Prompt(prompt), prompt, number, image, image))
    scores.write_table(rows, folder / "per_prompt.csv")
    scores.write_images(pairs, folder / "images")
    Image.new("RGB", (30, 20), "red").save(folder / "contact_sheet.jpg")
    return folder


def test_the_metadata_are_what_the_hub_looks_for():
    data, _ = page()
    assert data == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "tags": ["custom-diffusion", "text-to-image", "diffusers", "stable-diffusion"],
        "instance_prompt": "photo of a <new1> cat",
        "inference": False,
    }


def test_the_text_tells_what_was_learned_and_how():
    _, text = page(CARD | {"concepts": {"cat": CAT, "dog": DOG}})
    for words in (
        "teaches a text-to-image model `<new1>` (cat), `<new2>` (dog) from a few pictures",
        "[`owner/base`](https://huggingface.co/owner/base) (revision `v2`) (variant `fp16`)",
        "| `<new2>` | dog | `a <new2> dog` |",
        "| trained | keys and values of cross-attention, and the new words |",
        "| steps | 250 |",
        "| resolution | 512 px |",
        "| seed | 7 |",
        "| versions | python 3.11.7, torch 2.15.0 |",
        "`apache-2.0`",
        'DiffusionPipeline.from_pretrained("owner/base", revision="v2", variant="fp16")',
        "customdiff sample 'photo of a <new1> cat' --adapter anna/grey-cat\n",
    ):
        assert words in text
    for absent in ("Gallery", "How good", "contact_sheet", "None", "rank", "not on the Hub"):
        assert absent not in text


@pytest.mark.parametrize(
    ("changes", "words", "absent", "tag"),
    [
        (
            {"freeze_model": "crossattn"},
            "| trained | all of cross-attention, and the new words |",
            "LoRA",
            "custom-diffusion",
        ),
        ({"method": "textual_inversion"}, "the new words alone", "load_attn_procs", "textual_inversion"),
        ({"method": "lora"}, 'pipe.load_lora_weights("anna/grey-cat", weight_name="pytorch_lora', "load_attn", "lora"),
        ({"compressed": True}, "Diffusers alone cannot read it", "load_attn_procs", "custom-diffusion"),
        ({"seed": 0}, "| seed | 0 |", "None", "custom-diffusion"),
        ({"seed": None, "steps": None, "versions": {}}, "| resolution |", "None", "custom-diffusion"),
    ],
)
def test_each_method_is_called_what_it_is(changes, words, absent, tag):
    data, text = page(CARD | changes)
    assert words in text
    assert absent not in text
    assert data["tags"][0] == tag


def test_a_base_model_in_a_folder_is_no_base_model_of_the_hub():
    data, text = page(CARD | {"base": {"model": "./data/base", "revision": None, "variant": None}})
    assert not {"base_model", "base_model_relation"} & set(data)
    assert "**The base model is not on the Hub.** `./data/base` is a folder" in text
    assert "huggingface.co/./" not in text


def test_figures_stand_in_the_table_and_in_the_metadata(tmp_path):
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CARD)
    data, text = page(evaluation=found)
    assert "change, 95 % interval over 2 prompts" in text
    assert "| image alignment | 0.062 | 0.562 | +0.500, +0.375 to +0.625 |" in text
    assert "| text alignment | 1.125 | 1.250 | +0.125, -0.062 to +0.250 |" in text
    [index] = data["model-index"]
    [result] = index["results"]
    assert (index["name"], result["task"]["type"]) == ("grey-cat", "text-to-image")
    assert {each["type"]: each["value"] for each in result["metrics"]} == {
        "image-alignment": 0.5625,
        "text-alignment": 1.25,
    }


def test_the_figures_of_several_concepts_are_told_apart(tmp_path):
    card = CARD | {"concepts": {"cat": CAT, "dog": DOG}}
    folder = write_results(tmp_path / "evaluate", ("cat", "dog"))
    rows = (folder / "per_prompt.csv").read_text()
    (folder / "per_prompt.csv").write_text(rows + "cat and dog,{1} and {2} on grass,companion,1,1,0,1,1,0\n")
    (folder / "images/customized/cat-and-dog").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images/customized/cat-and-dog/05-1-and-2-on-grass-0.png")
    data, text = page(card, evaluation=model_card.read_evaluation(folder, card))
    assert "| cat: image alignment |" in text
    assert "| dog: text alignment |" in text
    assert [each["text"] for each in data["widget"]] == [
        "a <new1> cat on red",
        "a <new1> cat on grass",
        "a <new2> dog on red",
        "a <new2> dog on grass",
        "<new1> cat and <new2> dog on grass",
    ]


def test_the_gallery_shows_the_first_image_of_each_prompt(tmp_path):
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CARD)
    data, text = page(evaluation=found)
    assert data["widget"] == [
        {"text": "a <new1> cat on red", "output": {"url": "images/01-a-on-red-0.png"}},
        {"text": "a <new1> cat on grass", "output": {"url": "images/02-a-on-grass-0.png"}},
    ]
    assert "<Gallery />" in text
    assert "first image of each of 2 evaluation prompts" in text
    second = found.samples["02-a-on-grass-0.png"].image
    assert second.getpixel((0, 0)) == (50, 0, 0)


def test_of_many_prompts_some_are_shown_evenly(tmp_path):
    folder = write_results(tmp_path / "evaluate", prompts=[f"a {{}} number {number}" for number in range(30)])
    prompts = [each.prompt for each in model_card.read_evaluation(folder, CARD).samples.values()]
    assert prompts == [f"a <new1> cat number {number}" for number in range(0, 30, 3)]


def test_how_the_images_were_drawn_is_said_where_it_is_known(tmp_path):
    settings = Evaluate(steps=25, guidance_scale=3.5, scheduler="dpmsolver++")
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CARD, settings)
    _, text = page(evaluation=found)
    assert "25 steps of dpmsolver++, a guidance of 3.5." in text
    assert "--adapter anna/grey-cat --steps 25 --guidance-scale 3.5 --scheduler dpmsolver++\n" in text
    assert 'pipe("a <new1> cat on red", num_inference_steps=25, guidance_scale=3.5).images[0]' in text


def test_results_of_other_concepts_are_refused(tmp_path):
    folder = write_results(tmp_path / "evaluate", ("teapot",))
    with pytest.raises(UserError, match="evaluates teapot, which this adapter has not learned"):
        model_card.read_evaluation(folder, CARD)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"concepts": {"cat": 1}}'])
def test_results_that_cannot_be_read_are_one_line(tmp_path, content):
    folder = write_results(tmp_path / "evaluate")
    (folder / "metrics.json").unlink()
    if content is not None:
        (folder / "metrics.json").write_text(content)
    with pytest.raises(UserError, match="no figures can be read"):
        model_card.read_evaluation(folder, CARD)


def test_only_numbers_are_kept_of_the_figures(tmp_path):
    folder = write_results(tmp_path / "evaluate", judge="/home/anna/clip", more={"path": "/home/anna", "kid": 0.5})
    metrics = model_card.read_evaluation(folder, CARD).metrics
    assert metrics["more"] == {"kid": 0.5}
    assert "/home" not in json.dumps(metrics)
    assert metrics["image_alignment_delta_ci95"] == [0.375, 0.625]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("owner/name", "owner/name"),
        ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
        ("data/base", "./data/base"),
        ("./data/base", "./data/base"),
        ("data/models/base", "./data/models/base"),
        ("base", "./base"),
        ("../sd14", "./sd14"),
        ("/home/anna/models/sd14", "./sd14"),
        ("~/models/sd14/", "./sd14"),
        (r"C:\Users\anna\sd14", "./sd14"),
        (r"data\base", "./data/base"),
    ],
)
def test_a_base_model_is_a_repository_or_a_dotted_folder(tmp_path, monkeypatch, model, expected):
    (tmp_path / "data/base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    near = tmp_path / "models" / "adapter"
    for folder in (tmp_path, tmp_path / "elsewhere"):  # the project's folder is found from the adapter's too
        monkeypatch.chdir(folder)
        card = CARD | {"base": {"model": model, "revision": None, "variant": None}}
        assert model_card.published(card, near)["base"]["model"] == expected


def test_what_is_published_has_no_path_and_loses_nothing_else(tmp_path):
    card = CARD | {"files": ["/mnt/x/photo.png", r"D:\x\y.png", "~/z", "../w", "a/b"], "also": {"at": "/srv/x"}}
    card |= {"concepts": {"cat": CAT | {"instance_prompt": "a {} cat / dog, 50 % \\ more, a:b"}}}
    published = model_card.published(card, tmp_path)
    assert published["files"] == ["photo.png", "y.png", "z", "w", "a/b"]
    assert published["also"] == {"at": "x"}
    assert {key: published[key] for key in CARD} == {**CARD, "concepts": card["concepts"]}
    assert Base.model_validate(published["base"]).revision == "v2"


@pytest.mark.parametrize("word", ["<a|b>", "`<x>`", "--- # <y>", "{{ 7 * 7 }}", "{% raw %}", "'\"\\"])
def test_no_word_breaks_the_card(word):
    concept = CAT | {"modifier_token": word, "instance_prompt": "photo of a {} cat\nlicense: mit"}
    made = model_card.make(REPO, CARD | {"concepts": {"cat": concept}}, license="apache-2.0")
    read = ModelCard(made.content)
    assert read.data.license == "apache-2.0"
    assert word in read.data.to_dict()["instance_prompt"]
    shown = word.replace("|", r"\|")
    assert shown in read.text
    code = read.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "49" not in read.text


# what `customdiff push` makes of the pipeline's own folders


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A project's folder after `dvc repro`, with an adapter, results and params.yaml."""
    monkeypatch.chdir(tmp_path)
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    attention.inject_processors(pipe.unet, "crossattn_kv")
    fields = {key: value for key, value in CARD.items() if key not in ("fingerprint", "processors", "family")}
    learned = adapter.from_pipeline(_with_word(pipe), fields)
    adapter.save(learned, "models/adapter")
    write_results(Path("results/evaluate"))
    params = {"concepts": {"cat": {key: CAT[key] for key in ("modifier_token", "class_prompt", "instance_prompt")}}}
    params["concepts"]["cat"]["source"] = {"path": "cats"}
    params["evaluate"] = {"steps": 25, "guidance_scale": 3.5}
    Params.model_validate(params)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for age, path in enumerate(("results/evaluate/metrics.json", "models/adapter/adapter.json", "params.yaml")):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return tmp_path


def _with_word(pipe):
    from customdiff.models import modifier_tokens

    modifier_tokens.add_tokens(pipe, {"<new1>": modifier_tokens.initial_embedding(pipe, "cat")})
    return pipe


def built(*arguments):
    """README.md, files and output of a dry run into `out`."""
    result = CliRunner().invoke(
        cli.commands, ["push", REPO, "--license", "mit", "--dry-run", "out", *map(str, arguments)]
    )
    assert result.exit_code == 0, result.exception
    names = {path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file()}
    return Path("out/README.md").read_text(), names, result.output


def test_the_pipelines_own_results_are_found(project):
    text, names, output = built()
    assert "| image alignment | 0.062 | 0.562 |" in text
    assert "--steps 25 --guidance-scale 3.5\n" in text
    assert {"metrics.json", "images/01-a-on-red-0.png", "images/02-a-on-grass-0.png"} <= names
    assert "contact_sheet.jpg" not in names
    assert "note" not in output
    assert json.loads(Path("out/metrics.json").read_text())["num_prompts"] == 2


def test_the_contact_sheet_goes_only_where_it_is_asked_for(project):
    text, names, _ = built("--contact-sheet")
    assert "contact_sheet.jpg" in names
    assert "](contact_sheet.jpg)" in text


def test_images_go_without_what_other_programs_wrote_into_them(project):
    image = Path("results/evaluate/images/customized/cat/01-a-on-red-0.png")
    notes = PngInfo()
    notes.add_text("parameters", "/home/anna/secret")
    pixels = Image.open(image).copy()
    pixels.save(image, pnginfo=notes)
    assert b"secret" in image.read_bytes()
    built()
    there = Path("out/images") / image.name
    assert b"secret" not in there.read_bytes()
    np.testing.assert_array_equal(np.asarray(Image.open(there)), np.asarray(pixels))


def test_results_older_than_the_adapter_are_left_out_but_for_an_order(project):
    os.utime("models/adapter/adapter.json")
    text, names, output = built()
    assert "How good" not in text
    assert "metrics.json" not in names
    assert "note: results/evaluate is older than the adapter and left out" in output
    Path("out").rename("first")
    text, _, _ = built("--results", "results/evaluate")
    assert "How good" in text


def test_settings_that_were_edited_since_are_not_told(project):
    os.utime("params.yaml")
    text, _, _ = built()
    assert "How good" in text
    assert "--steps" not in text


def test_another_adapter_has_none_of_the_pipelines_figures(project):
    Path("models/adapter").rename("elsewhere")
    text, names, output = built("--adapter", "elsewhere")
    assert "How good" not in text
    assert not any(name.startswith("images/") for name in names)
    assert "note: the card has no figures and no images; --results names the folder" in output
