"""Captions of instance images: where they come from, what is refused, and captioners of transformers by name."""

import pytest
import torch
from conftest import noisy_images, tiny_params, tiny_tokenizer
from PIL import Image
from preparation import tiny_captioners
from transformers import AutoModelForImageTextToText, AutoProcessor

from customdiff.errors import UserError
from customdiff.preparation import captions
from customdiff.preparation.captioner import Captioner, first_words, one_sentence
from customdiff.preparation.examples import instance_examples

CPU = torch.device("cpu")


@pytest.fixture
def concept(tiny_base):
    return tiny_params(tiny_base).concepts["cat"]


def settings(tiny_base, **values):
    return tiny_params(tiny_base, prepare=values).prepare


def test_a_sidecar_goes_first_then_the_template(tmp_path, tiny_base, concept):
    first, second = noisy_images(tmp_path, 2)
    first.with_suffix(".txt").write_text("a {} cat\n  on red\n")
    found = captions.instance_captions([first, second], concept, settings(tiny_base, captioner=None), CPU)
    assert [(caption.text, caption.origin) for caption in found] == [
        ("a <new1> cat on red", "sidecar"),
        ("photo of a <new1> cat", "template"),
    ]
    found = captions.instance_captions([first], concept, settings(tiny_base, captions="template"), CPU)
    assert found[0].origin == "template"


def test_every_photo_needs_a_sidecar_if_sidecars_are_asked_for(tmp_path, tiny_base, concept):
    paths = noisy_images(tmp_path, 1)
    with pytest.raises(UserError, match=r"prepare\.captions: 000\.png"):
        captions.instance_captions(paths, concept, settings(tiny_base, captions="sidecar"), CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a cat on red\n", r"<new1>"),
        (b" \n", r"empty"),
        (b"a {} cat beside <new2>\n", r"<new2>.*<new1>"),
        (b"a {} cat \xff\n", r"UTF-8"),
    ],
)
def test_a_bad_sidecar_is_an_error_that_names_the_file(tmp_path, concept, text, message):
    (path,) = noisy_images(tmp_path, 1)
    path.with_suffix(".txt").write_bytes(text)
    with pytest.raises(UserError, match=rf"000\.txt: .*{message}"):
        captions.sidecar_caption(path, concept)


def test_the_token_is_inserted_into_a_description(concept):
    assert captions.with_token("a Cat, on red", concept) == "a <new1> Cat, on red"
    owl = concept.model_copy(update={"class_prompt": "owl"})
    assert captions.with_token("photo of an owl at night", owl) == "photo of a <new1> owl at night"
    assert captions.with_token("an animal", concept) == "photo of a <new1> cat, an animal"


def test_a_long_caption_is_cut_at_a_word(tmp_path, concept):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    room = tokenizer.model_max_length - 2 - captions.PREFIX_TOKENS
    words = ["a", "<new1>", *["cat"] * room]
    text = captions.cut_to_tokens(" ".join(words), tokenizer, concept.modifier_token)
    assert words[: len(text.split())] == text.split()
    assert len(tokenizer(text.replace("<new1>", "a"), add_special_tokens=False).input_ids) <= room
    longer = " ".join(words[: len(text.split()) + 1]).replace("<new1>", "a")
    assert len(tokenizer(longer, add_special_tokens=False).input_ids) > room
    assert captions.cut_to_tokens("a <new1> cat", tokenizer, "<new1>") == "a <new1> cat"


def test_a_cut_caption_is_reported(tmp_path, tiny_base, concept):
    (path,) = noisy_images(tmp_path, 1)
    path.with_suffix(".txt").write_text("a {} cat" + " on red" * 60)
    (found,) = captions.instance_captions(
        [path], concept, settings(tiny_base), CPU, tiny_tokenizer(tmp_path / "tokenizer")
    )
    assert "too long" in found.warnings[0]
    assert found.text.startswith("a <new1> cat")


@pytest.mark.parametrize("name", tiny_captioners.CAPTIONERS)
def test_captioners_are_loaded_by_name(tmp_path, tiny_base, concept, name):
    """Models of random weights: what they say is noise; that their words become captions is what is tested."""
    folder = tiny_captioners.make(name, tmp_path / name)
    paths = noisy_images(tmp_path / "images", 2)
    chosen = settings(tiny_base, captioner=str(folder))
    found = instance_examples(tmp_path / "images", concept, chosen, CPU)
    assert [example.path for example in found] == paths
    for example in found:
        assert "<new1> cat" in example.caption
        assert len(example.caption.split()) > 10
        assert "caption: captioner" in example.notes


@pytest.mark.parametrize("name", ["blip", "git"])
def test_blip_and_git_continue_the_first_words(tmp_path, name):
    folder = tiny_captioners.make(name, tmp_path / name)
    (path,) = noisy_images(tmp_path, 1)
    image = Image.open(path).convert("RGB")
    (found,) = Captioner(str(folder), CPU).captions([image], "cat")

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    ids = processor.tokenizer("photo of a cat").input_ids[: None if name == "blip" else -1]
    pixels = processor.image_processor(image, return_tensors="pt").pixel_values
    out = model.generate(pixel_values=pixels, input_ids=torch.tensor([ids]), max_new_tokens=60, do_sample=False)
    assert found == processor.tokenizer.decode(out[0], skip_special_tokens=True).strip(" .")
    assert found.startswith("photo of a cat ")


def test_a_chat_model_is_told_the_class_and_only_its_answer_counts(tmp_path):
    captioner = Captioner(str(tiny_captioners.make("llava", tmp_path / "llava")), CPU)
    image = Image.new("RGB", (40, 50), "red")
    asked = captioner.processor.tokenizer.decode(captioner._inputs(image, "dog")["input_ids"][0])
    assert "photo of a dog" in asked
    (answer,) = captioner.captions([image], "dog")
    assert "write one short caption" not in answer


class Silent:
    def __init__(self, *arguments) -> None: ...

    def captions(self, images, class_prompt):
        return ["", "a dog far away"]


def test_a_captioner_that_answers_nothing_leaves_the_template(tmp_path, tiny_base, concept, monkeypatch):
    monkeypatch.setattr(captions, "Captioner", Silent)
    paths = noisy_images(tmp_path, 2)
    silent, other = captions.instance_captions(paths, concept, settings(tiny_base, captioner="silent"), CPU)
    assert (silent.text, silent.origin) == ("photo of a <new1> cat", "template")
    assert "nothing" in silent.warnings[0]
    assert other.text == "photo of a <new1> cat, a dog far away"


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ('"photo of a cat on a sofa."\n', "photo of a cat on a sofa"),
        ("A cat on a sofa. It sleeps. The light is warm.", "A cat on a sofa"),
        (" \n ", ""),
    ],
)
def test_one_sentence_of_an_answer(answer, caption):
    assert one_sentence(answer) == caption


def test_first_words():
    assert first_words("cat") == "photo of a cat"
    assert first_words("Owl") == "photo of an Owl"


def test_a_model_that_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.captioner: no captioner.*nothing"):
        Captioner(str(tmp_path / "nothing"), CPU)
    folder = tiny_captioners.make("git", tmp_path / "git")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"prepare\.captioner"):
        Captioner(str(folder), CPU)
