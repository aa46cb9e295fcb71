"""Every model generates the same prompts from the same seeds, as diffusers itself would with one adapter loaded."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import concept_values, random_adapter
from diffusers import DDIMScheduler
from PIL import Image
from stand_ins import BOTH, PROMPTS, CountingGeneration, generation, plain

from customdiff.adapters import adapter
from customdiff.errors import UserError
from customdiff.evaluation.generation import (
    ImagePair,
    class_subject,
    customized_subject,
    generate_pairs,
    write_images,
)
from customdiff.evaluation.prompts import Prompt
from customdiff.models import base, methods
from customdiff.models.sampling import image_seed


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory):
    """Two adapters of one training's kind, one of the dog alone, a LoRA, and one like the first again."""
    out = tmp_path_factory.mktemp("adapters")
    kinds = {
        "first": {"concepts": BOTH},
        "second": {"concepts": BOTH},
        "dog only": {"concepts": {"dog": BOTH["dog"]}},
        "lora": {"concepts": BOTH, "method": "lora"},
    }
    return {
        name: random_adapter(tiny_base, out / name, seed=seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    }


def test_an_image_has_a_seed_that_other_prompts_do_not_change(tiny_base):
    requests = generation(tiny_base).requests(PROMPTS)
    assert [(each.prompt, each.number) for each in requests] == [(p, n) for p in PROMPTS for n in (0, 1)]
    assert requests[1].seed == image_seed(42, "cat", "a {} on red", 1)
    assert len({each.seed for each in requests}) == 6
    assert generation(tiny_base).requests(PROMPTS[1:]) == requests[2:]


def test_a_further_noise_seed_has_the_images_of_the_next_base_seed(tiny_base):
    how = generation(tiny_base, seeds=2)
    requests = how.requests(PROMPTS)
    assert [(each.prompt, each.repeat, each.number) for each in requests] == [
        (prompt, repeat, number) for prompt in PROMPTS for repeat in (0, 1) for number in (0, 1)
    ]
    following = generation(tiny_base)
    following = dataclasses.replace(following, base=following.base.model_copy(update={"seed": 43}))
    for repeat, alone in enumerate((generation(tiny_base), following)):
        own = [each.seed for each in requests if each.repeat == repeat]
        assert own == [each.seed for each in alone.requests(PROMPTS)]


def test_the_base_model_is_given_the_class_and_an_adapter_the_token_and_class(tiny_base):
    how = generation(tiny_base, num_images=1)
    requests = how.requests(PROMPTS)
    words = ["a cat on red", "the dog", "a cat and a dog"]
    assert how.texts(requests, class_subject) == words
    customized = ["a <new1> cat on red", "the <new2> dog", "a <new1> cat and a <new2> dog"]
    assert how.texts(requests, customized_subject) == customized
    assert [how.reference_text(prompt) for prompt in PROMPTS] == words


def alone(model, folder=None):
    """A pipeline with one adapter, or with none, and diffusers' own DDIM."""
    pipe = base.load_pipeline(generation(model).base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if folder:
        adapter.load(pipe, folder)
    return pipe


def one_image(pipe, text, seed):
    generator = torch.Generator().manual_seed(seed)
    return pipe(text, num_inference_steps=2, guidance_scale=6.0, eta=1.0, generator=generator).images[0]


def assert_alike(found, expected):
    # 1 of 255: batches of another size round differently
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_adapters_of_any_kind_after_one_another_generate_what_each_does_alone(tiny_base, adapters):
    how = generation(tiny_base)
    found = dict(generate_pairs(how, adapters, PROMPTS))
    seeds = {(each.prompt, each.number): each.seed for each in how.requests(PROMPTS)}
    assert list(found) == list(adapters)
    base_model = alone(tiny_base)
    for name, folder in adapters.items():
        customized = alone(tiny_base, folder)
        known = PROMPTS[1:2] if name == "dog only" else PROMPTS
        assert [(pair.prompt, pair.number) for pair in found[name]] == [(p, n) for p in known for n in (0, 1)]
        for pair in found[name][1::2]:
            seed = seeds[pair.prompt, pair.number]
            assert_alike(pair.base, one_image(base_model, pair.text, seed))
            assert_alike(pair.customized, one_image(customized, how.text(pair.prompt, customized_subject), seed))
    images = [pair.customized.tobytes() for name in adapters for pair in found[name] if pair.prompt == PROMPTS[1]]
    assert len(set(images)) == 2 * len(adapters), "every adapter generates images of its own"


def test_the_base_model_generates_once_and_is_loaded_again_only_for_another_kind(tiny_base, adapters):
    how = generation(tiny_base, kind=CountingGeneration)
    for names, loads in ((["first", "second"], 1), (["first", "lora", "second"], 3)):
        how.counts.clear()
        list(generate_pairs(how, {name: adapters[name] for name in names}, PROMPTS))
        # six images are one batch, of two steps
        assert how.counts == {"loads": loads, "evaluations": 2 * (1 + len(names))}


def test_base_images_come_from_the_cache_the_next_time(tiny_base, adapters, tmp_path):
    how = generation(tiny_base, tmp_path / "cache", CountingGeneration)
    for evaluations in (4, 2):
        how.counts.clear()
        ((_, pairs),) = generate_pairs(how, {"first": adapters["first"]}, PROMPTS)
        assert how.counts["evaluations"] == evaluations
    ((_, uncached),) = generate_pairs(generation(tiny_base), {"first": adapters["first"]}, PROMPTS)
    assert [pair.base.tobytes() for pair in pairs] == [pair.base.tobytes() for pair in uncached]


@pytest.mark.parametrize("trouble", ["another base model", "a missing file", "another token", "another concept"])
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_generated(
    tiny_base, tiny_v_base, adapters, tmp_path, trouble
):
    model = tiny_v_base if trouble == "another base model" else tiny_base
    concepts = {"another token": {"cat": concept_values("<new7>")}, "another concept": {"pot": concept_values("<p>")}}
    misfit = random_adapter(model, tmp_path / "misfit", concepts=concepts.get(trouble))
    named = {"another base model": str(tiny_v_base), "another token": r"concepts\.cat", "another concept": "misfit"}
    if trouble == "a missing file":
        (misfit / "<new1>.safetensors").unlink()
    how = generation(tiny_base, kind=CountingGeneration)
    how.counts.clear()
    with pytest.raises(UserError, match=named.get(trouble, "misfit")):
        list(generate_pairs(how, {"first": adapters["first"], "misfit": misfit}, PROMPTS))
    assert "evaluations" not in how.counts


def generated(pipe):
    """(32, 32, 3) float, before rounding to bytes."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a <new1> cat", num_inference_steps=2, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize(
    ("model", "method"), [*(("tiny_base", method) for method in methods.METHODS), ("tiny_xl_base", "custom_diffusion")]
)
def test_a_replaced_adapter_leaves_no_trace(request, tmp_path, model, method):
    folder = request.getfixturevalue(model)
    one, two = (adapter.read(random_adapter(folder, tmp_path / str(seed), method=method, seed=seed)) for seed in (1, 2))
    assert adapter.is_replaceable(one, two)
    pipe, fresh = (base.load_pipeline(generation(folder).base) for _ in range(2))
    adapter.inject(pipe, one)
    first = generated(pipe)
    adapter.replace(pipe, two)
    adapter.inject(fresh, two)
    np.testing.assert_array_equal(generated(pipe), generated(fresh))
    assert np.abs(generated(pipe) - first).max() > 0.001
    adapter.replace(pipe, one)
    np.testing.assert_array_equal(generated(pipe), first)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "lora"},
        {"freeze_model": "crossattn"},
        {"concepts": BOTH},
        {"concepts": {"cat": concept_values("<new3>")}},
        {"model": "tiny_v_base"},
        {"model": "another tiny_base"},
    ],
)
def test_an_adapter_of_another_kind_is_not_replaceable(tiny_base, tiny_v_base, tmp_path, change):
    model = tiny_v_base if change.get("model") == "tiny_v_base" else tiny_base
    kind = {key: value for key, value in change.items() if key != "model"}
    one = adapter.read(random_adapter(tiny_base, tmp_path / "one"))
    other = adapter.read(random_adapter(model, tmp_path / "other", **kind))
    if change.get("model") == "another tiny_base":
        moved = [value + 1 for value in other.config.fingerprint]
        other = adapter.Adapter(other.weights, other.embeddings, other.config.with_changes(fingerprint=moved))
    assert not adapter.is_replaceable(one, other)
    assert not adapter.is_replaceable(other, one)


def test_every_noise_seed_has_its_images_and_its_controls(tiny_base, adapters, tmp_path):
    how = generation(tiny_base, seeds=2, num_images=1)
    ((_, pairs),) = generate_pairs(how, {"first": adapters["first"]}, PROMPTS[:1], [Prompt("a pot", ()), PROMPTS[0]])
    assert [(pair.is_control, pair.repeat, pair.is_first) for pair in pairs] == [
        *((False, repeat, repeat == 0) for repeat in (0, 1)),
        *((True, repeat, repeat == 0) for _ in range(2) for repeat in (0, 1)),
    ]
    assert [pair.base.tobytes() for pair in pairs[4:]] == [pair.base.tobytes() for pair in pairs[:2]]
    assert len({pair.customized.tobytes() for pair in pairs}) == 6
    write_images(pairs, tmp_path)
    assert len(list((tmp_path / "customized").rglob("*.png"))) == 6


def test_every_image_is_written_under_the_same_name_for_both_models(tmp_path):
    def pair(template, number, red, concepts=("tom",)):
        return ImagePair(Prompt(template, concepts), "", number, plain(red), plain(red + 1))

    alike = [pair("a {}!", 0, 10), pair("a {}!", 1, 20), pair("a {}?", 0, 30)]
    joint = pair("a {1} and a {2}", 0, 40, ("tom", "pot"))
    write_images([*alike, joint], tmp_path)
    written = {kind: sorted((tmp_path / kind).rglob("*.png")) for kind in ("base", "customized")}
    assert [len(paths) for paths in written.values()] == [4, 4]
    names = [[path.relative_to(tmp_path / kind) for path in paths] for kind, paths in written.items()]
    assert names[0] == names[1]
    reds = {kind: [Image.open(path).getpixel((0, 0))[0] for path in paths] for kind, paths in written.items()}
    assert reds == {"base": [10, 20, 30, 40], "customized": [11, 21, 31, 41]}
    assert {path.parent.name for path in written["base"]} == {"tom", "tom+pot"}
