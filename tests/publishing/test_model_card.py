"""The model card has the concepts and figures in the Hub's form, and nothing of the machine it was made on."""

import dataclasses
import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from adapters_on_disk import write_adapter
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from customdiff import cli
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Base, Evaluate, Params
from customdiff.errors import UserError
from customdiff.evaluation.generation import ImagePair, write_images
from customdiff.evaluation.metrics import PairedMetric
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.scores import PromptScore, Summary, write_table
from customdiff.publishing import model_card

REPO = "anna/grey-cat"
CAT = {"modifier_token": "<new1>", "initializer": "cat", "class_prompt": "cat", "instance_prompt": "photo of a {} cat"}
DOG = {"modifier_token": "<new2>", "initializer": "dog", "class_prompt": "dog", "instance_prompt": "a {} dog"}
CONFIG = AdapterConfig.model_validate(
    {
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
)
METRICS = {
    "text_alignment": PairedMetric(1.125, 1.25, 0.125, -0.0625, 0.25),
    "image_alignment": PairedMetric(0.0625, 0.5625, 0.5, 0.375, 0.625),
}


def page(config=CONFIG, **options):
    """The card as the Hub reads it: metadata and text."""
    made = ModelCard(model_card.make(REPO, config, license="apache-2.0", **options).content)
    return made.data.to_dict(), made.text


PROMPTS = (Prompt("a {} on red", ("cat",)), Prompt("a {} on grass", ("cat",)))


def write_results(folder, prompts=PROMPTS):
    """The output of `evaluate`, written by its own functions; two images per prompt, each of another color."""
    labels = {prompt.concept_label: METRICS for prompt in prompts}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(Summary(METRICS, labels, len(prompts), 2 * len(prompts)).to_json())
    even = dict.fromkeys(METRICS, 0.5)
    write_table([PromptScore(prompt, even, even) for prompt in prompts], folder / "per_prompt.csv")
    pairs = []
    for shade, prompt in enumerate(prompts):
        for number in range(2):
            image = Image.new("RGB", (8, 8), (50 * shade % 256, 100 * number, 0))
            pairs.append(ImagePair(prompt, "", number, image, image))
    write_images(pairs, folder / "images")
    Image.new("RGB", (30, 20), "red").save(folder / "contact_sheet.jpg")
    return folder


def test_the_metadata_are_those_of_the_hubs_specification():
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
    _, text = page(CONFIG.with_changes(concepts={"cat": CAT, "dog": DOG}))
    for words in (
        "`<new1>` (cat), `<new2>` (dog)",
        "[`owner/base`](https://huggingface.co/owner/base) (revision `v2`) (variant `fp16`)",
        "| `<new2>` | dog | `a <new2> dog` |",
        "| trained | keys and values of cross-attention, and the modifier tokens |",
        "| steps | 250 |",
        "| resolution | 512 px |",
        "| seed | 7 |",
        "| versions | python 3.11.7, torch 2.15.0 |",
        "`apache-2.0`",
        'DiffusionPipeline.from_pretrained("owner/base", revision="v2", variant="fp16")',
        "customdiff sample 'photo of a <new1> cat' --adapter anna/grey-cat\n",
    ):
        assert words in text
    for absent in ("Gallery", "## Evaluation", "contact_sheet", "None", "rank", "not on the Hub"):
        assert absent not in text


@pytest.mark.parametrize(
    ("changes", "words", "absent", "tag"),
    [
        ({"freeze_model": "crossattn"}, "| trained | all of cross-attention", "LoRA", "custom-diffusion"),
        ({"method": "textual_inversion"}, "Textual Inversion", "load_attn_procs", "textual_inversion"),
        ({"method": "lora"}, 'pipe.load_lora_weights("anna/grey-cat", weight_name="pytorch_lora', "load_attn", "lora"),
        ({"compressed": {"ranks": [1]}}, "| compressed | yes |", "load_attn_procs", "custom-diffusion"),
        ({"seed": 0}, "| seed | 0 |", "None", "custom-diffusion"),
        ({"seed": None, "steps": None, "versions": {}}, "| resolution |", "None", "custom-diffusion"),
    ],
)
def test_each_method_is_called_what_it_is(changes, words, absent, tag):
    data, text = page(CONFIG.with_changes(**changes))
    assert words in text
    assert absent not in text
    assert data["tags"][0] == tag


def test_a_base_model_in_a_folder_is_no_base_model_of_the_hub():
    data, text = page(CONFIG.with_changes(base={"model": "./data/base"}))
    assert not {"base_model", "base_model_relation"} & set(data)
    assert "**The base model is not on the Hub.** `./data/base`" in text
    assert "huggingface.co/./" not in text


def test_figures_stand_in_the_table_and_in_the_metadata(tmp_path):
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CONFIG)
    data, text = page(evaluation=found)
    assert "95 % interval over 2 prompts" in text
    assert "| image alignment | 0.062 | 0.562 | +0.500, +0.375 to +0.625 |" in text
    assert "| text alignment | 1.125 | 1.250 | +0.125, -0.062 to +0.250 |" in text
    [index] = data["model-index"]
    [result] = index["results"]
    assert (index["name"], result["task"]["type"]) == ("grey-cat", "text-to-image")
    assert {each["type"]: each["value"] for each in result["metrics"]} == {
        "image-alignment": 0.5625,
        "text-alignment": 1.25,
    }


def test_identity_is_published_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "identity", PairedMetric(0.25, 0.75, 0.5, 0.375, 0.625))
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CONFIG)
    data, text = page(evaluation=found)
    assert "| identity | 0.250 | 0.750 | +0.500, +0.375 to +0.625 |" in text
    assert "cut-out" not in text
    [result] = data["model-index"][0]["results"]
    assert {each["type"] for each in result["metrics"]} == {"image-alignment", "identity", "text-alignment"}


def test_the_figures_of_several_concepts_are_told_apart(tmp_path):
    config = CONFIG.with_changes(concepts={"cat": CAT, "dog": DOG})
    prompts = [Prompt("a {} on red", ("cat",)), Prompt("a {}", ("dog",)), Prompt("{1} on {2}", ("cat", "dog"))]
    folder = write_results(tmp_path / "evaluate", prompts)
    data, text = page(config, evaluation=model_card.read_evaluation(folder, config))
    assert "| cat: image alignment |" in text
    assert "| cat+dog: text alignment |" in text
    expected = ["a <new1> cat on red", "a <new2> dog", "<new1> cat on <new2> dog"]
    assert [each["text"] for each in data["widget"]] == expected


def test_the_gallery_shows_the_first_image_of_each_prompt(tmp_path):
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CONFIG)
    data, text = page(evaluation=found)
    assert data["widget"] == [
        {"text": "a <new1> cat on red", "output": {"url": "images/01-a-on-red-0.png"}},
        {"text": "a <new1> cat on grass", "output": {"url": "images/02-a-on-grass-0.png"}},
    ]
    assert "<Gallery />" in text
    assert "2 evaluation prompts" in text
    second = found.samples["02-a-on-grass-0.png"].image
    assert second.getpixel((0, 0)) == (50, 0, 0)


def test_of_many_prompts_some_are_shown_evenly(tmp_path):
    folder = write_results(tmp_path / "evaluate", [Prompt(f"a {{}} number {number}", ("cat",)) for number in range(30)])
    prompts = [each.prompt for each in model_card.read_evaluation(folder, CONFIG).samples.values()]
    assert prompts == [f"a <new1> cat number {number}" for number in range(0, 30, 3)]


def test_how_the_images_were_drawn_is_said_where_it_is_known(tmp_path):
    settings = Evaluate(steps=25, guidance_scale=3.5, scheduler="dpmsolver++")
    found = model_card.read_evaluation(write_results(tmp_path / "evaluate"), CONFIG, settings)
    _, text = page(evaluation=found)
    assert "25 steps of dpmsolver++, guidance scale 3.5." in text
    assert "--adapter anna/grey-cat --steps 25 --guidance-scale 3.5 --scheduler dpmsolver++\n" in text
    assert 'pipe("a <new1> cat on red", num_inference_steps=25, guidance_scale=3.5).images[0]' in text


def test_results_of_other_concepts_are_refused(tmp_path):
    folder = write_results(tmp_path / "evaluate", [Prompt("{1} on {2}", ("cat", "teapot"))])
    with pytest.raises(UserError, match="teapot"):
        model_card.read_evaluation(folder, CONFIG)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"concepts": {"cat": 1}}', '{"text_alignment": 1.2}'])
def test_results_that_cannot_be_read_are_one_line(tmp_path, content):
    folder = write_results(tmp_path / "evaluate")
    (folder / "metrics.json").unlink()
    if content is not None:
        (folder / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json") as caught:
        model_card.read_evaluation(folder, CONFIG)
    assert "\n" not in str(caught.value)


def test_only_the_figures_of_the_results_are_kept(tmp_path):
    folder = write_results(tmp_path / "evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["text_alignment"]["judge"] = metrics["judge"] = "/home/anna/clip"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    kept = model_card.read_evaluation(folder, CONFIG).metrics
    assert "/home" not in kept.model_dump_json()
    assert dataclasses.asdict(kept.image_alignment) == metrics["image_alignment"]


def test_the_contact_sheet_is_read_only_on_request(tmp_path):
    folder = write_results(tmp_path / "evaluate")
    assert model_card.read_evaluation(folder, CONFIG).sheet is None
    assert model_card.read_evaluation(folder, CONFIG, with_sheet=True).sheet.size == (30, 20)
    (folder / "contact_sheet.jpg").unlink()
    with pytest.raises(UserError, match=r"contact_sheet\.jpg"):
        model_card.read_evaluation(folder, CONFIG, with_sheet=True)


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
        config = CONFIG.with_changes(base={"model": model})
        assert model_card.published(config, near).base.model == expected


def test_what_is_published_has_no_path_and_loses_nothing_else(tmp_path):
    prompt = "a {} cat / dog, 50 % \\ more, a:b"
    changes = {"files": ["/mnt/x/photo.png", r"D:\x\y.png", "~/z", "../w", "a/b"], "also": {"at": "/srv/x"}}
    config = CONFIG.with_changes(concepts={"cat": CAT | {"instance_prompt": prompt}}, **changes)
    published = model_card.published(config, tmp_path).model_dump()
    assert published.pop("files") == ["photo.png", "y.png", "z", "w", "a/b"]
    assert published.pop("also") == {"at": "x"}
    assert published == {key: value for key, value in config.model_dump().items() if key not in changes}
    assert Base.model_validate(published["base"]).revision == "v2"


HOSTILE = [
    "<a|b>",
    "`<x>`",
    "--- # <y>",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "'\"\\",
    "<script>x</script>",
    "![x](https://y/z)",
]


@pytest.mark.parametrize("word", [*HOSTILE, "[x](javascript:alert(1))", "<img src=x onerror=alert(1)>", "</code><b>"])
def test_no_word_breaks_the_card(word):
    token = re.sub(r"[\s/\\]", "", word)
    words = {"modifier_token": token, "class_prompt": word, "instance_prompt": f"photo of a {{}} {word}\nlicense: mit"}
    config = CONFIG.with_changes(concepts={"cat": CAT | words}, versions={word: word})
    made = model_card.make(REPO, config, license="apache-2.0")
    read = ModelCard(made.content)
    assert read.data.license == "apache-2.0"
    assert word in read.data.to_dict()["instance_prompt"]
    code = read.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "49" not in read.text
    shown = MarkdownIt("commonmark").enable("table").render(read.text)
    tags = set(re.findall(r"<(/?\w+)", shown))
    assert not tags & {"script", "img", "b", "a|b", "x", "y"}
    assert "javascript" not in " ".join(re.findall(r'href="([^"]*)"', shown))
    assert word in html.unescape(shown)


# what `customdiff push` makes of the pipeline's own folders


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A project's folder after `dvc repro`, with an adapter, results and params.yaml."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tiny_base, Path("models/adapter"))
    write_results(Path("results/evaluate"))
    params = {"concepts": {"cat": {key: CAT[key] for key in ("modifier_token", "class_prompt", "instance_prompt")}}}
    params["concepts"]["cat"]["source"] = {"path": "cats"}
    params["evaluate"] = {"steps": 25, "guidance_scale": 3.5}
    Params.model_validate(params)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for age, path in enumerate(("results/evaluate/metrics.json", "models/adapter/adapter.json", "params.yaml")):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return tmp_path


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
    assert "results" not in output  # the note about the local base model is the only one
    assert json.loads(Path("out/metrics.json").read_text())["num_prompts"] == 2


def test_the_contact_sheet_is_published_on_request(project):
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
    assert "## Evaluation" not in text
    assert "metrics.json" not in names
    assert "note: " in output
    assert "results/evaluate is older" in output
    Path("out").rename("first")
    text, _, _ = built("--results", "results/evaluate")
    assert "## Evaluation" in text


def test_settings_that_were_edited_since_are_not_told(project):
    os.utime("params.yaml")
    text, _, _ = built()
    assert "## Evaluation" in text
    assert "--steps" not in text


def test_another_adapter_has_none_of_the_pipelines_figures(project):
    Path("models/adapter").rename("elsewhere")
    text, names, output = built("--adapter", "elsewhere")
    assert "## Evaluation" not in text
    assert not any(name.startswith("images/") for name in names)
    assert "note: " in output
    assert "--results" in output
