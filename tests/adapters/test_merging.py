"""A merge is the paper's constrained least squares: by a second way in numpy, by hand, and on tiny pipelines."""

import itertools
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import concept_values, tiny_params
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

import customdiff
from customdiff import cli
from customdiff.adapters import adapter, compression, merging
from customdiff.adapters.config import AdapterConfig, LearnedConcept
from customdiff.errors import UserError
from customdiff.models import attention, base, modifier_tokens
from customdiff.models.text import text_encoders

CAPTIONS = [
    "photo of a cat on the grass",
    "a dog",
    "the red pot",
    "a very small dog on the red grass",
    "far away grass",
]


def learned(folder, token="<new1>", name="cat", seed=1, freeze_model="crossattn_kv"):
    """An adapter whose every weight was moved at random, as if it had been learned alone."""
    params = tiny_params(folder)
    pipe = base.load_pipeline(params.base)
    generator = torch.Generator().manual_seed(seed)

    def row(encoder):
        return torch.randn(encoder.config.hidden_size, generator=generator)

    modifier_tokens.add_tokens(pipe, {token: {key: row(encoder) for key, (_, encoder) in text_encoders(pipe).items()}})
    with torch.no_grad():
        for weight in attention.inject_processors(pipe.unet, freeze_model).values():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    config = {
        "base": params.base.model_dump(),
        "concepts": {name: concept_values(token, name)},
        "method": "custom_diffusion",
        "freeze_model": freeze_model,
        "steps": 6,
        "seed": seed,
    }
    return adapter.from_pipeline(pipe, AdapterConfig.model_validate(config))


def two(folder):
    return {"one": learned(folder), "other": learned(folder, "<new2>", "dog", 2)}


def plain(folder):
    return base.load_pipeline(tiny_params(folder).base)


def problem(width=9, targets=(2, 3), captions=40, fidelity=10.0, seed=0):
    """A random problem of two adapters, and what it is made of as numpy arrays."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(width, width))
    regularization, *named = (draw.normal(size=(captions, width)) @ mix for _ in range(3))
    held = [draw.normal(size=(count, width)) for count in targets]
    changes = [draw.normal(size=(4, width)) for _ in range(2)]

    def moment(x):
        return torch.from_numpy(x.T @ x / len(x))

    fidelity = [fidelity, 3 * fidelity]
    solved = merging.Problem(
        moment(regularization), [moment(x) for x in named], [torch.from_numpy(x) for x in held], fidelity
    )
    return solved, regularization, named, held, changes


def objective(change, regularization, named, changes, fidelities):
    """The sum of squares as the module's head writes it, on the states themselves."""
    ridge = merging.RIDGE * (regularization**2).sum() / len(regularization) / regularization.shape[1]
    value = ((change @ regularization.T) ** 2).sum() / len(regularization) + ridge * (change**2).sum()
    for one, states, fidelity in zip(changes, named, fidelities, strict=True):
        value += fidelity * (((change - one) @ states.T) ** 2).sum() / len(states)
    return value


@pytest.mark.parametrize("fidelity", [0.0, 0.7, 10.0])
def test_the_solution_is_that_of_the_kkt_equations(fidelity):
    """[2H C'; C 0] [change'; multipliers] = [2b; values], solved as one linear system by numpy."""
    solved, regularization, named, held, changes = problem(fidelity=fidelity)
    width = regularization.shape[1]
    hessian = regularization.T @ regularization / len(regularization)
    hessian += merging.RIDGE * np.trace(hessian) / width * np.eye(width)
    linear = np.zeros((width, 4))
    for one, states, fidelity in zip(changes, named, solved.fidelity, strict=True):
        hessian += fidelity * states.T @ states / len(states)
        linear += fidelity * states.T @ states @ one.T / len(states)
    stacked = np.concatenate(held)
    values = np.concatenate([states @ one.T for one, states in zip(changes, held, strict=True)])
    system = np.block([[2 * hessian, stacked.T], [stacked, np.zeros((len(stacked), len(stacked)))]])
    expected = np.linalg.solve(system, np.concatenate([2 * linear, values]))[:width].T
    found = merging.Solver(solved).change([torch.from_numpy(one) for one in changes])
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_a_case_solved_by_hand():
    """G = [[1, 1/2], [1/2, 1]] and the ridge on its diagonal, 1.1 with it; the change of (1, 0)' is held at 3.

    1.1 a^2 + a b + 1.1 b^2 with a = 3 is least at b = -3 / 2.2.
    """
    solved = merging.Problem(
        torch.tensor([[1, 0.5], [0.5, 1]]).double(), [torch.eye(2).double()], [torch.tensor([[1.0, 0]]).double()], [0.0]
    )
    found = merging.Solver(solved).change([torch.tensor([[3.0, 7.0]]).double()])
    np.testing.assert_allclose(found.numpy(), [[3, -3 / 2.2]], rtol=1e-12)


@pytest.mark.parametrize("fidelity", [0.0, 10.0])
def test_no_other_change_that_keeps_the_constraint_is_better(fidelity):
    solved, regularization, named, held, changes = problem(fidelity=fidelity, seed=3)
    found = merging.Solver(solved).change([torch.from_numpy(one) for one in changes]).numpy()
    for one, states in zip(changes, held, strict=True):
        np.testing.assert_allclose(found @ states.T, one @ states.T, rtol=0, atol=1e-10)
    free = np.linalg.svd(np.concatenate(held))[2][5:]  # directions that no target state has a part in
    assert free.shape == (4, 9)
    least = objective(found, regularization, named, changes, solved.fidelity)
    draw = np.random.default_rng(4)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            other = found + scale * draw.normal(size=(4, 4)) @ free
            assert objective(other, regularization, named, changes, solved.fidelity) > least


def test_dependent_targets_are_met_where_they_agree_and_else_in_the_mean():
    draw = np.random.default_rng(5)
    states = torch.from_numpy(draw.normal(size=(2, 6)))
    twice, third = torch.cat([states, states[:1] + states[1:]]), torch.from_numpy(draw.normal(size=(1, 6)))
    changes = [torch.from_numpy(draw.normal(size=(4, 6))) for _ in range(2)]
    grams = torch.eye(6).double(), [torch.eye(6).double()] * 2
    agreeing = merging.Solver(merging.Problem(*grams, [twice, third], [10.0, 10.0]))
    assert agreeing.rank == 3
    torch.testing.assert_close(agreeing.change(changes) @ twice.T, changes[0] @ twice.T)
    torch.testing.assert_close(agreeing.change(changes) @ third.T, changes[1] @ third.T)
    conflicting = merging.Solver(merging.Problem(*grams, [states, states], [10.0, 10.0]))
    assert conflicting.rank == 2
    torch.testing.assert_close(conflicting.change(changes) @ states.T, (changes[0] + changes[1]) @ states.T / 2)


def test_captions_fewer_than_directions_are_enough():
    solved, *_, held, changes = problem(width=30, captions=3)
    assert torch.linalg.matrix_rank(solved.regularization) == 3
    found = merging.Solver(solved).change([torch.from_numpy(one) for one in changes]).numpy()
    assert np.abs(found).max() < 100
    for one, states in zip(changes, held, strict=True):
        np.testing.assert_allclose(found @ states.T, one @ states.T, rtol=0, atol=1e-9)


def states_of(pipe, captions, length=16):
    """What a UNet reads of captions, by transformers' and diffusers' own calls: (N, L, D) float64."""
    with torch.no_grad():
        if not hasattr(pipe, "tokenizer_2"):
            ids = pipe.tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
            return pipe.text_encoder(ids).last_hidden_state.double()
        return pipe.encode_prompt(captions, do_classifier_free_guidance=False)[0].double()


@pytest.mark.parametrize("kind", ["tiny_base", "tiny_v_base", "tiny_xl_base"])
@pytest.mark.parametrize("fidelity", [0.0, merging.FIDELITY])
def test_each_concept_s_words_are_what_its_own_adapter_makes_of_them(request, kind, fidelity):
    folder = request.getfixturevalue(kind)
    parts = two(folder)
    merged = merging.merge(plain(folder), parts, CAPTIONS, fidelity)
    assert (merged.targets, merged.rank) == (12, 12)
    assert merged.residual < 1e-5
    pipe = plain(folder)
    originals = {
        name: weight.detach().double() for name, weight in attention.originals(pipe.unet, "crossattn_kv").items()
    }
    adapter.inject(pipe, merged.adapter)
    for part, words in zip(parts.values(), ("<new1> cat", "<new2> dog"), strict=True):
        # start token, token, class, end; start token, "a", "photo", "of", token, class, end
        states = states_of(pipe, [words, f"a photo of {words}"])
        words = torch.cat([states[0, 1:4], states[1, 4:7]])
        for name, weight in part.weights.items():
            own, found = (words @ one.double().T for one in (weight, merged.adapter.weights[name]))
            assert (found - own).norm() < 1e-5 * own.norm()
            assert (found - words @ originals[name].T).norm() > 0.1 * own.norm()


def test_the_whole_merge_has_the_least_objective(tiny_base):
    """On all states of all captions, as transformers gives them, against random changes that keep the target words."""
    parts = two(tiny_base)
    pipe = plain(tiny_base)
    originals = {
        name: weight.detach().double() for name, weight in attention.originals(pipe.unet, "crossattn_kv").items()
    }
    fidelities = [10.0, 30.0]
    merged = merging.merge(pipe, parts, CAPTIONS, fidelities).adapter
    cat = ["photo of a <new1> cat on the grass", "photo of a <new1> cat", "<new1> cat", "a photo of <new1> cat"]
    dog = ["a <new2> dog", "a very small <new2> dog on the red grass", "photo of a <new2> dog", "<new2> dog"]
    dog += ["a photo of <new2> dog"]
    regularization, *named = (states_of(pipe, texts).flatten(0, 1).numpy() for texts in (CAPTIONS, cat, dog))
    held = np.concatenate([x[0, 1:4] for x in (states_of(pipe, [w]) for w in ("<new1> cat", "<new2> dog"))])
    held = np.concatenate([held, *(states_of(pipe, [f"a photo of {w}"])[0, 4:7] for w in ("<new1> cat", "<new2> dog"))])
    free = np.linalg.svd(held)[2][len(held) :]
    draw = np.random.default_rng(6)
    for name, original in originals.items():
        changes = [(part.weights[name].double() - original).numpy() for part in parts.values()]
        found = (merged.weights[name].double() - original).numpy()
        least = objective(found, regularization, named, changes, fidelities)
        slope = max(
            abs(objective(found + step * other, regularization, named, changes, fidelities) - least)
            for step, other in itertools.product((1e-4, -1e-4), draw.normal(size=(5, len(original), len(free))) @ free)
        )
        assert slope < 1e-5 * least  # flat to first order: 1e-8 of second order, and fp32's rounding
        for other in draw.normal(size=(5, len(original), len(free))) @ free:
            assert objective(found + 0.01 * other, regularization, named, changes, fidelities) > least


def test_one_adapter_merged_alone_is_itself_at_its_words(tiny_base):
    part = learned(tiny_base)
    pipe = plain(tiny_base)
    merged = merging.merge(pipe, {"one": part}, CAPTIONS, 0.0).adapter
    words = states_of(pipe, ["<new1> cat"])[0, 1:4]
    for name, weight in part.weights.items():
        torch.testing.assert_close(
            words @ merged.weights[name].double().T, words @ weight.double().T, atol=1e-5, rtol=0
        )
        assert not torch.allclose(merged.weights[name], weight, atol=0.1)
    faithful = merging.merge(plain(tiny_base), {"one": part}, CAPTIONS, 1e9).adapter
    shown = states_of(pipe, ["a very small <new1> cat", "photo of a <new1> cat"])[1]
    for name, weight in part.weights.items():
        torch.testing.assert_close(
            shown @ faithful.weights[name].double().T, shown @ weight.double().T, atol=1e-3, rtol=0
        )


def draw(pipe, prompt="photo of a <new1> cat on <new2> dog"):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 3, "guidance_scale": 6.0, "generator": generator, "output_type": "np"}
    return pipe(prompt, **arguments).images[0]


def test_the_folder_draws_the_same_here_and_in_plain_diffusers(tiny_base, tmp_path):
    pipe = plain(tiny_base)
    merged = merging.merge(pipe, two(tiny_base), CAPTIONS).adapter
    adapter.save(merged, tmp_path)
    loaded = plain(tiny_base)
    customdiff.load(loaded, tmp_path)
    np.testing.assert_array_equal(draw(loaded), draw(pipe))
    other = StableDiffusionPipeline.from_pretrained(tiny_base)
    before = draw(other, "photo of a cat on dog")
    other.unet.load_attn_procs(tmp_path, weight_name=f"{adapter.WEIGHTS}.safetensors", _pipeline=other)
    for token in ("<new1>", "<new2>"):
        other.load_textual_inversion(str(tmp_path), weight_name=f"{token}.safetensors")
    np.testing.assert_allclose(draw(other), draw(pipe), atol=1e-4)
    assert np.abs(draw(other) - before).max() > 0.01


def test_the_config_has_all_concepts_and_says_what_they_come_from(tiny_base):
    parts = {"one": learned(tiny_base), "other": learned(tiny_base, "<new2>", "cat", 2)}
    merged = merging.merge(plain(tiny_base), parts, CAPTIONS).adapter.config
    assert {name: concept.modifier_token for name, concept in merged.concepts.items()} == {
        "cat": "<new1>",
        "cat2": "<new2>",
    }
    assert merged.merged_from == [
        {"tokens": ["<new1>"], "steps": 6, "seed": 1},
        {"tokens": ["<new2>"], "steps": 6, "seed": 2},
    ]
    assert (merged.method, merged.freeze_model) == ("custom_diffusion", "crossattn_kv")
    assert merged.steps is None


def test_a_compressed_adapter_is_multiplied_out_first(tiny_base):
    parts = two(tiny_base)
    small = compression.compress(plain(tiny_base), parts["one"], rank=3)
    product = replace(parts["one"], weights=adapter.full_weights(small, plain(tiny_base)))
    found = merging.merge(plain(tiny_base), parts | {"one": small}, CAPTIONS).adapter
    expected = merging.merge(plain(tiny_base), parts | {"one": product}, CAPTIONS).adapter
    assert "compressed" not in found.config
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight)


def test_a_merged_adapter_is_merged_again(tiny_base):
    """Adapters of several tokens are as good as those of one."""
    both = merging.merge(plain(tiny_base), two(tiny_base), CAPTIONS).adapter
    third = learned(tiny_base, "<new3>", "pot", 3)
    merged = merging.merge(plain(tiny_base), {"both": both, "third": third}, CAPTIONS)
    assert list(merged.adapter.embeddings) == ["<new1>", "<new2>", "<new3>"]
    assert merged.targets == 18
    assert merged.residual < 1e-5


def test_captions_speak_of_a_concept_by_its_token():
    concept = LearnedConcept.model_validate(concept_values("<new1>", "cat"))
    captions = ["a cat and a cat", "A Cat, asleep", "a category", "the dog"]
    assert merging.captions_of(concept, captions) == [
        "photo of a <new1> cat",
        "<new1> cat",
        "a photo of <new1> cat",
        "a <new1> cat and a cat",
        "A <new1> cat, asleep",
    ]


def test_moments_are_of_all_states_in_any_batches(tiny_base, monkeypatch):
    pipe = plain(tiny_base)
    states = states_of(pipe, CAPTIONS).flatten(0, 1).numpy()
    monkeypatch.setattr(merging, "BATCH_SIZE", 2)
    np.testing.assert_allclose(merging.moment(pipe, CAPTIONS).numpy(), states.T @ states / len(states), atol=1e-5)


def test_captions_are_read_from_a_file_a_folder_or_a_pool(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n\n  a   dog \na cat\n", encoding="utf-8")
    assert merging.read_captions(file) == ["a cat", "a dog"]
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "caption.txt").write_text(f"one {name}\ntwo {name}s\n", encoding="utf-8")
    assert merging.read_captions(tmp_path / "classes") == ["one cat", "two cats", "one dog", "two dogs"]
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "1.png").write_bytes(b"no picture")
    (tmp_path / "sample" / "1.txt").write_text("in a tar", encoding="utf-8")
    (tmp_path / "pool").mkdir()
    with tarfile.open(tmp_path / "pool" / "pool.tar", "w") as tar:
        tar.add(tmp_path / "sample", ".")
    assert merging.read_captions(tmp_path / "pool") == ["in a tar"]
    drawn = merging.read_captions(tmp_path / "classes", limit=3)
    assert len(set(drawn)) == 3
    assert drawn == merging.read_captions(tmp_path / "classes", limit=3)
    (tmp_path / "unused").mkdir()
    (tmp_path / "unused/caption.txt").touch()  # a training without class images
    given = {name: merging.has_captions(tmp_path / name) for name in ("classes", "pool", "unused", "nowhere")}
    assert given == {"classes": True, "pool": True, "unused": False, "nowhere": False}
    with pytest.raises(UserError, match=r"--captions: .*nowhere"):
        merging.read_captions(tmp_path / "nowhere")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--captions: .*captions"):
        merging.read_captions(file)


def of_method(method):
    def change(part):
        return replace(part, config=part.config.with_changes(**{"method": method, "lora_rank": 2}))

    return change


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (of_method("lora"), "other: method lora.*custom_diffusion"),
        (of_method("textual_inversion"), "other: method textual_inversion"),
        (
            lambda part: replace(part, config=part.config.with_changes(**{"freeze_model": "crossattn"})),
            "other: freeze_model crossattn .*crossattn_kv",
        ),
        (
            lambda part: replace(part, embeddings={"<new1>": part.embeddings["<new2>"]}),
            "other: token <new1> .*one",
        ),
        (
            lambda part: replace(part, embeddings={"<NEW1>": part.embeddings["<new2>"]}),
            "other: token <NEW1> .*one",
        ),
        (
            lambda part: replace(
                part, config=part.config.with_changes(**{"fingerprint": [x + 1 for x in part.config.fingerprint]})
            ),
            "other: .*trained on .*another base model",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_rejected_by_name(tiny_base, changed, message):
    parts = two(tiny_base)
    with pytest.raises(UserError, match=message):
        merging.merge(plain(tiny_base), parts | {"other": changed(parts["other"])}, CAPTIONS)


def test_captions_with_only_modifier_tokens_are_rejected(tiny_base):
    with pytest.raises(UserError, match="--captions: "):
        merging.merge(plain(tiny_base), two(tiny_base), ["a <new1> cat", "<new2>"])


def run(*arguments):
    """One call of the command line inside this process; a UserError stays an exception."""
    return CliRunner().invoke(cli.commands, ["merge", *map(str, arguments)])


@pytest.fixture
def folders(tiny_base, tmp_path):
    """Two adapters on disk, and captions."""
    for name, part in two(tiny_base).items():
        adapter.save(part, tmp_path / name)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    return tmp_path


def test_the_command_writes_what_the_library_makes(folders, tiny_base):
    out = folders / "both"
    done = run(folders / "one", folders / "other", "--captions", folders / "captions.txt", "--out", out)
    assert done.exit_code == 0, done.output
    assert f"{out}: <new1>, <new2>; 5 captions, 12 target states of rank 12" in done.output
    expected = merging.merge(plain(tiny_base), two(tiny_base), CAPTIONS).adapter
    found = adapter.read(out)
    assert found.config == expected.config
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight)
    assert "note:" not in done.output
    weighed = ["--fidelity", 1, "--fidelity", 20, "--captions", folders / "captions.txt", "--out", folders / "weighed"]
    assert run(folders / "one", folders / "other", *weighed).exit_code == 0
    expected = merging.merge(plain(tiny_base), two(tiny_base), CAPTIONS, [1.0, 20.0]).adapter
    for name, weight in adapter.read(folders / "weighed").weights.items():
        torch.testing.assert_close(weight, expected.weights[name])
    (folders / "others.txt").write_text("the dog", encoding="utf-8")
    done = run(folders / "one", folders / "other", "--captions", folders / "others.txt", "--out", folders / "again")
    assert "'cat'" in done.output
    assert "'dog'" not in done.output


def test_command_errors_are_one_line_and_write_nothing(folders, tiny_v_base):
    adapter.save(learned(tiny_v_base, "<new3>", "pot"), folders / "stranger")
    captions = ["--captions", folders / "captions.txt"]
    for arguments, message in (
        ([folders / "one"], "ADAPTER: .*one"),
        ([folders / "one", folders / "one"], "ADAPTER: .*one, .*one"),
        ([folders / "one", folders / "stranger", *captions], "stranger: .*trained on .*tiny-v"),
        ([folders / "one", folders / "nowhere"], "no adapter found"),
        ([folders / "one", folders / "other", *["--fidelity", 1] * 3], "--fidelity: 3 .*2 adapters"),
        ([folders / "one", folders / "other", "--captions", folders / "none.txt"], "--captions: .*none.txt"),
    ):
        done = run(*arguments, "--out", folders / "out")
        assert isinstance(done.exception, UserError)
        assert re.search(message, str(done.exception))
        assert not list(folders.glob("out*"))
    done = run(folders / "one", folders / "other", *captions, "--out", folders / "stranger")
    assert "--out: " in str(done.exception)
