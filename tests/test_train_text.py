"""Fine-tuning the base's text encoder: captions are cut into phrases, and each phrase gets its target states."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import CLIPTextModel, CLIPTokenizer

from world.loop import load_params
from world.train_text import Caption, Learner, cut, draw_caption


@pytest.fixture(scope="module")
def learner() -> Learner:
    text = CLIPTextModel.from_pretrained(ROOT / "data/base/text_encoder", dtype=torch.float32)
    return Learner(text, CLIPTokenizer.from_pretrained(ROOT / "data/base/tokenizer"), weight=1.0)


@pytest.mark.parametrize(
    ("caption", "subjects", "colours", "parts"),
    [
        (
            "photo of a cat and a red car on the grass",
            ("cat", "car"),
            (None, "red"),
            ("photo of", "a cat and", "a red car", "on the grass"),
        ),
        (
            "an apple next to green grapes",
            ("apple", "grapes"),
            (None, "green"),
            ("", "an apple next to", "green grapes", ""),
        ),
        (
            "a very small red car on the grass",
            ("car",),
            ("red",),
            ("a very small red car on the grass", "", "", ""),
        ),
        ("close up of a red car", ("car",), ("red",), ("close up of", "", "a red car", "")),
    ],
)
def test_a_caption_is_cut_into_its_parts(caption, subjects, colours, parts):
    assert cut(caption, subjects, colours) == Caption(*parts)
    assert str(Caption(*parts)) == caption


def test_drawn_captions_are_cut_whatever_their_wording():
    rng = np.random.default_rng(0)
    drawn = [draw_caption(rng, load_params("text")) for _ in range(300)]
    two = [caption for caption in drawn if caption.first]
    assert len(two) / len(drawn) == pytest.approx(load_params("text")["pairs"], abs=0.1)
    for caption in drawn:
        assert str(caption).split() == [word for part in parts_of(caption) for word in part.split()]


def parts_of(caption: Caption) -> tuple[str, ...]:
    return caption.opening, caption.first, caption.last, caption.place


def test_targets_are_states_of_the_phrase_without_the_others_and_earlier_states_elsewhere(learner):
    pair = cut("a photo of a red cat next to a blue car on the grass", ("cat", "car"), ("red", "blue"))
    single = cut("a red dog in the snow", ("dog",), ("red",))
    tokens = learner.tokens([str(pair), str(single)])
    states, changed = learner.targets([pair, single], ["an owl", "a house"], tokens)
    alone, owl, house = learner.teacher(
        learner.tokens(["a photo of a blue car on the grass", "a photo of an owl on the grass", "a house in the snow"])
    )
    words = [learner.tokenizer.convert_ids_to_tokens(row[mask]) for row, mask in zip(tokens, changed, strict=True)]
    assert [" ".join(row).replace("</w>", "") for row in words] == ["a blue car on the grass", "in the snow"]
    torch.testing.assert_close(states[0, changed[0]], torch.cat([alone[4:7], owl[6:9]]))
    torch.testing.assert_close(states[1, changed[1]], house[3:6])
    torch.testing.assert_close(states[~changed], learner.teacher(tokens)[~changed])


def test_training_moves_the_encoder_and_no_token_embedding(learner):
    values = learner([cut("a red cat and a blue car in the snow", ("cat", "car"), ("red", "blue"))], ["an owl"])
    assert values["own"] > 10 * values["kept"]
    values["loss"].backward()
    assert learner.text.get_input_embeddings().weight.grad is None
    assert all(p.grad is not None for p in learner.text.encoder.parameters())
