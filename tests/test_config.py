"""The schema: every wrong params.yaml gets one line that names the key and the mend."""

import copy
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from customdiff import config
from customdiff.config import ParamsError

GOOD = {
    "concepts": {
        "cat": {
            "source": {"path": "data/concepts/cat"},
            "modifier_token": "<new1>",
            "class_prompt": "cat",
            "instance_prompt": "photo of a {} cat",
        }
    }
}


def load(tmp_path: Path, change=lambda values: None) -> config.Params:
    values = copy.deepcopy(GOOD)
    change(values)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return config.load(path)


def test_defaults_are_those_of_the_reference_script(tmp_path):
    """Values read off the argument parser of diffusers' train_custom_diffusion.py."""
    read = load(tmp_path)
    assert (read.train.adam_beta1, read.train.adam_beta2) == (0.9, 0.999)
    assert (read.train.adam_weight_decay, read.train.adam_epsilon, read.train.max_grad_norm) == (1e-2, 1e-8, 1.0)
    assert (read.train.prior_loss_weight, read.train.lr_scheduler) == (1.0, "constant")
    assert (read.retrieve.num_class_images, read.prepare.resolution, read.base.seed) == (200, 512, 42)
    assert (read.train.validation.num_images, read.train.validation.every) == (2, 50)
    assert read.concepts["cat"].caption == "photo of a <new1> cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(trian={}), "trian: unknown key; did you mean train?"),
        (lambda v: v.update(train={"learning_rte": 1}), "train.learning_rte: unknown key; did you mean learning_rate?"),
        (lambda v: v.update(train={"learning_rate": -1}), "train.learning_rate: input should be greater than 0"),
        (
            lambda v: v.update(train={"learning_rate": float("nan")}),
            "train.learning_rate: input should be a finite number",
        ),
        (lambda v: v.update(train={"max_steps": "many"}), "train.max_steps: input should be a valid integer"),
        (lambda v: v.update(train={"lr_scheduler": "cosin"}), "train.lr_scheduler: input should be 'constant'"),
        (
            lambda v: v.update(train={"validation": {"promts": []}}),
            "train.validation.promts: unknown key; did you mean prompts?",
        ),
        (lambda v: v.update(prepare={"resolution": 510}), "prepare.resolution: input should be a multiple of 8"),
        (
            lambda v: v.update(retrieve={"num_class_images": 5, "minimum": 9}),
            "minimum (9) is above num_class_images (5)",
        ),
        (lambda v: v.update(evaluate={"eta": 2}), "evaluate.eta: input should be less than or equal to 1"),
        (lambda v: v.clear(), "concepts: is required"),
        (lambda v: v["concepts"].clear(), "concepts: dictionary should have at least 1 item"),
        (lambda v: v["concepts"].update(Dog=v["concepts"]["cat"]), "concepts.Dog: string should match pattern"),
        (lambda v: v["concepts"].update(dog=v["concepts"]["cat"]), "modifier_token <new1> is used twice"),
        (lambda v: v["concepts"]["cat"].pop("class_prompt"), "concepts.cat.class_prompt: is required"),
        (
            lambda v: v["concepts"]["cat"].update(instance_prompt="photo"),
            "concepts.cat.instance_prompt: ",
        ),
        (lambda v: v["concepts"]["cat"].update(source={}), "exactly one of path, url and hub (here: none)"),
        (
            lambda v: v["concepts"]["cat"]["source"].update(hub="a/b"),
            "exactly one of path, url and hub (here: path, hub)",
        ),
        (
            lambda v: v.update(train={"validation": {"prompts": ["a {}", "a <new2> cat"]}}),
            "train.validation.prompts: 'a <new2> cat' names <new2>, which no concept has (modifier tokens: <new1>)",
        ),
        (
            lambda v: v["concepts"]["cat"].update(source={"url": "http://x/y.zip"}),
            "source.url: string should match pattern",
        ),
    ],
)
def test_an_invalid_file_is_a_one_line_error(tmp_path, change, message):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "params.yaml" in str(caught.value)


def test_each_error_has_its_own_line(tmp_path):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, lambda v: v.update(train={"max_steps": 0, "batch_size": 0}, base={"seeed": 1}))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "not valid YAML"),
        ("base:\n  seed: 1\n  seed: 2\n", "key 'seed' is given twice"),
        ("- a\n- b\n", "base:, concepts: and train:"),
        ("", "base:, concepts: and train:"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=message):
        config.load(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ParamsError, match="customdiff preset"):
        config.load(tmp_path / "params.yaml")


def test_a_rate_written_without_a_dot_is_a_number(tmp_path):
    """YAML 1.1 reads 1e-5 as text; users of the reference write it all the time."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "train:\n  learning_rate: 1e-5\n")
    assert config.load(path).train.learning_rate == 1e-5


def test_validation_prompts_name_every_concept_in_turn_and_may_have_other_text_in_brackets(tmp_path):
    def change(values):
        values["concepts"]["pot"] = values["concepts"]["cat"] | {
            "modifier_token": "<b>-1",
            "class_prompt": "wooden pot",
        }
        values["train"] = {"validation": {"prompts": ["a {} on grass", "a <new1> cat <3", "< a cat >", "{} and {}"]}}

    assert load(tmp_path, change).validation_prompts == [
        *("a <new1> cat on grass", "a <b>-1 wooden pot on grass", "a <new1> cat <3", "< a cat >"),
        *("<new1> cat and <new1> cat", "<b>-1 wooden pot and <b>-1 wooden pot"),
    ]


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "customdiff/presets").glob("*.yaml"))], ids=lambda p: p.stem
)
def test_what_we_ship_is_valid(path):
    config.load(path)


def test_the_sd14_cat_preset_has_the_guides_values():
    """TokenEmbedding S3, S4, S5 and S13: the values that diffusers' guide gives for a single concept."""
    read = config.load(ROOT / "customdiff/presets" / "sd14-cat.yaml")
    assert read.base.model == "CompVis/stable-diffusion-v1-4"
    assert (read.prepare.resolution, read.prepare.hflip) == (512, True)
    assert (read.train.batch_size, read.train.learning_rate, read.train.lr_warmup_steps) == (2, 1e-5, 0)
    assert (read.train.max_steps, read.train.scale_lr, read.train.prior_loss_weight) == (250, True, 1.0)
    assert read.retrieve.num_class_images == 200
    assert read.concepts["cat"].caption == "photo of a <new1> cat"
    assert (read.evaluate.steps, read.evaluate.guidance_scale, read.evaluate.eta) == (100, 6.0, 1.0)
