"""Embeddings agree with what CLIPModel's own forward calls text_embeds and image_embeds."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, PreTrainedTokenizerFast

from customdiff.errors import UserError
from customdiff.models.clip import Clip

WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a", "cat", "dog", "on", "the", "grass", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of 32 px, 8 dimensions and 12 token positions, saved in fp16."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(WORDS), "max_position_embeddings": 12}
    # an end token of id 2 would make transformers pool by its legacy rule, at the largest token id
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel(config)
    with torch.no_grad():  # CLIP's own initialization is so small that every embedding is nearly the same
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.half().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )


def _copy_json(source, target):
    for file in source.glob("*.json"):
        shutil.copy(file, target)


def _pictures(count, side=32):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """The whole model's own forward, in float64, on tokens padded by hand and pixels normalized by hand."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()

    def forward(sentences, pictures):
        ids = [[2, *(WORDS.index(word) for word in sentence.split()), 3] for sentence in sentences]
        mask = [[1] * len(row) + [0] * (12 - len(row)) for row in ids]
        ids = [row + [0] * (12 - len(row)) for row in ids]
        pixels = np.stack([np.asarray(picture, np.float64) / 255 for picture in pictures])
        mean = np.array([0.48145466, 0.4578275, 0.40821073])
        std = np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                pixel_values=torch.tensor(pixels),
            )
        return output.text_embeds.numpy(), output.image_embeds.numpy()

    return forward


def test_embeddings_are_those_of_the_whole_models_forward(clip, reference):
    sentences = ["a cat", "the red dog on the grass", "cat"]
    pictures = _pictures(3)
    texts, images = reference(sentences, pictures)
    np.testing.assert_allclose(clip.text(sentences), texts, atol=2e-5)
    np.testing.assert_allclose(clip.images(pictures), images, atol=2e-5)
    assert np.abs(texts[0] - texts[1]).max() > 0.01, "the random model must tell sentences apart"


def test_embeddings_are_float32_of_norm_one_and_independent_of_batching(folder):
    clip = Clip.load(folder)
    clip.batch_size = 2
    sentences, pictures = ["a cat", "dog", "a dog on grass"], _pictures(3, side=48)
    for together, alone in (
        (clip.text(sentences), [clip.text([sentence]) for sentence in sentences]),
        (clip.images(pictures), [clip.images([picture]) for picture in pictures]),
    ):
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_all_modes_sizes_and_empty_lists_are_accepted(clip):
    picture = _pictures(1, side=40)[0]
    modes = [picture.convert(mode) for mode in ("RGBA", "L", "P")]
    assert clip.images(modes).shape == (3, 8)
    assert clip.text([]).shape == (0, 8)
    assert clip.images([]).shape == (0, 8)


def test_long_texts_are_truncated(clip):
    assert clip.text(["a cat " * 100]).shape == (1, 8)


def test_weights_stored_in_half_precision_are_held_in_fp32(clip):
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}


def test_a_missing_folder_is_a_one_line_error_with_the_key():
    with pytest.raises(UserError, match=r"^retrieve\.index\.clip: .*'no/such/folder'") as error:
        Clip.load("no/such/folder", key="retrieve.index.clip")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(folder, tmp_path):
    _copy_json(folder, tmp_path)
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"evaluate\.clip"):
        Clip.load(tmp_path)


def test_missing_vision_weights_are_rejected(folder, tmp_path):
    model = CLIPTextModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    _copy_json(folder, tmp_path)
    with pytest.raises(UserError, match="lacks"):
        Clip.load(tmp_path)
