"""Subject masks: where they are from, which are set aside, and segmenters of random weights loaded by name."""

import json

import numpy as np
import pytest
import torch
from conftest import noisy_images, tiny_params, tiny_tokenizer
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from customdiff.errors import UserError
from customdiff.preparation import masks, sheet
from customdiff.preparation.examples import Example, instance_examples
from customdiff.preparation.segmenter import CLIPSEG_THRESHOLD, Segmenter

CPU = torch.device("cpu")


def segformer(folder, labels=("background", "subject"), seed=0):
    """A SegFormer of random weights whose classifier reads brightness: label 1 wins where a pixel is bright."""
    torch.manual_seed(seed)
    config = SegformerConfig(
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def clipseg(folder):
    """A CLIPSeg of random weights with the tiny tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder.with_name("clipseg-tokenizer"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=sizes
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_a_semantic_segmenter_marks_what_is_not_background(tmp_path):
    folder = segformer(tmp_path / "model")
    image = Image.open(noisy_images(tmp_path, 1)[0])
    (found,) = Segmenter(str(folder), CPU).masks([image], "cat")
    assert found.shape == (40, 50)
    assert found.dtype == np.float32
    assert set(np.unique(found)) <= {0.0, 1.0}

    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    pixels = SegformerImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits
    upsampled = torch.nn.functional.interpolate(logits, size=(40, 50), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(found == 1, upsampled[0].argmax(0).numpy() == 1)


def test_clipseg_is_told_the_class(tmp_path):
    folder = clipseg(tmp_path / "model")
    image = Image.open(noisy_images(tmp_path, 1)[0])
    (found,) = Segmenter(str(folder), CPU).masks([image], "cat")
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    inputs = CLIPSegProcessor.from_pretrained(folder)(text=["cat"], images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.reshape(1, 1, 32, 32)
    upsampled = torch.nn.functional.interpolate(logits, size=(40, 50), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(found == 1, upsampled[0, 0].sigmoid().numpy() > CLIPSEG_THRESHOLD)


def test_a_label_that_names_the_class_is_preferred_and_some_label_must_fit(tmp_path):
    image = Image.open(noisy_images(tmp_path, 1)[0])
    labels = ("wall", "Cat, house cat", "dog")
    segmenter = Segmenter(str(segformer(tmp_path / "model", labels)), CPU)
    assert segmenter._labels("cat") == [1]
    with pytest.raises(UserError, match=r"prepare\.segmenter.*no label for 'teapot'"):
        next(segmenter.masks([image], "teapot"))


def test_a_segmenter_is_never_a_pickle_and_never_half_a_model(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.masks: no segmentation model.*nowhere"):
        Segmenter(str(tmp_path / "nowhere"), CPU, key="prepare.masks")
    folder = segformer(tmp_path / "pickled")
    weights = SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no segmentation model can be loaded"):
        Segmenter(str(folder), CPU)
    other = segformer(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_encoder_blocks": 4, "depths": [1, 1, 1, 2]}))
    with pytest.raises(UserError, match="lacks weights"):
        Segmenter(str(other), CPU)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (np.s_[0:0, 0:0], "empty"),
        (np.s_[:, :], "nearly the whole"),
        (np.s_[0:1, 0:1], "empty"),
        (np.s_[10:30, 10:40], ""),
        (np.s_[20:40, 10:45], ""),  # stands on the lower edge
    ],
)
def test_useless_masks_are_recognised(region, reason):
    coverage = np.zeros((40, 50), np.float32)
    coverage[region] = 1
    found = masks.problem_of(coverage)
    assert (reason in found) if reason else found == ""


def test_an_inverted_mask_touches_three_edges():
    coverage = np.ones((40, 50), np.float32)
    coverage[10:30, 10:40] = 0
    assert "three edges" in masks.problem_of(coverage)


def test_masks_brought_along_are_used_before_the_segmenter(tmp_path, tiny_base):
    paths = noisy_images(tmp_path / "images", 4)
    solid = np.zeros((40, 50), np.uint8)
    solid[10:30, 10:40] = 255
    Image.fromarray(solid).save(paths[0].with_name("000.mask.png"))
    Image.fromarray(np.zeros_like(solid)).save(paths[1].with_name("001.mask.png"))
    paths[2].with_suffix(".txt").write_text("a {} cat on red\n")
    manifest = {"images": [{"file": "000.png", "mask": "000.mask.png", "mask_from": "alpha"}]}
    (tmp_path / "images/manifest.json").write_text(json.dumps(manifest))
    segmenter = str(segformer(tmp_path / "model"))
    params = tiny_params(tiny_base, prepare={"segmenter": segmenter})
    concept = params.concepts["cat"]
    examples = instance_examples(tmp_path / "images", concept, params.prepare, CPU)
    assert len(examples) == 4  # masks are not photos
    assert any("mask: alpha" in note for note in examples[0].notes)
    assert examples[0].caption == "photo of a <new1> cat on a white background"
    np.testing.assert_array_equal(examples[0].mask.coverage * 255, solid)
    assert "warning: mask from file set aside: it is empty; the photo is used whole" in examples[1].notes
    assert not examples[1].captions_on
    assert examples[2].caption == "a <new1> cat on red"
    assert examples[2].notes == ("caption: sidecar", "mask: none")  # none is needed
    assert any("segmenter" in note for note in examples[3].notes)

    none = tiny_params(tiny_base, prepare={"masks": "none", "segmenter": "nowhere"}).prepare
    assert all(example.mask is None for example in instance_examples(tmp_path / "images", concept, none, CPU))
    every = instance_examples(tmp_path / "images", concept, params.prepare, CPU, all_masks=True)
    assert any("segmenter" in note for note in every[2].notes)
    assert not every[2].captions_on


def test_the_segmenter_is_asked_where_the_alpha_channel_is_no_mask(tmp_path, tiny_base):
    paths = noisy_images(tmp_path / "images", 1)
    whole = np.full((40, 50), 255, np.uint8)
    whole[0, 0] = 0  # a transparent corner
    Image.fromarray(whole).save(paths[0].with_name("000.mask.png"))
    manifest = {"images": [{"file": "000.png", "mask": "000.mask.png", "mask_from": "alpha"}]}
    (tmp_path / "images/manifest.json").write_text(json.dumps(manifest))
    settings = tiny_params(tiny_base, prepare={"segmenter": str(segformer(tmp_path / "model"))}).prepare
    found = masks.subject_masks(paths, "cat", settings, CPU)[paths[0]]
    assert "segmenter" in (found.mask.origin if found.mask else found.problem)


def test_no_segmenter_is_loaded_where_no_mask_is_needed(tmp_path, tiny_base):
    for path in noisy_images(tmp_path, 2):
        path.with_suffix(".txt").write_text("a {} cat on red\n")
    params = tiny_params(tiny_base, prepare={"segmenter": str(tmp_path / "nowhere")})
    examples = instance_examples(tmp_path, params.concepts["cat"], params.prepare, CPU)
    assert [example.caption for example in examples] == ["a <new1> cat on red"] * 2
    with pytest.raises(UserError, match=r"prepare\.segmenter"):
        instance_examples(tmp_path, params.concepts["cat"], params.prepare, CPU, all_masks=True)


def test_the_sheet_outlines_the_mask(tmp_path):
    coverage = np.zeros((40, 50), np.float32)
    coverage[10:30, 10:40] = 1
    path = noisy_images(tmp_path, 1)[0]
    photo = Image.open(path)
    drawn = np.asarray(sheet.outlined(photo, coverage))
    changed = (drawn != np.asarray(photo)).any(-1)
    assert changed[10, 10:40].all()
    assert changed[10:30, 39].all()
    assert not changed[12:28, 12:38].any()
    assert not changed[coverage == 0].any()
    example = Example(path, "a <new1> cat", masks.SubjectMask(coverage, "file"), {"red": "x"}, "mask from file")
    assert sheet.contact_sheet([example, Example(path, "a cat")]).height > 2 * sheet.SIDE


@pytest.mark.parametrize(("second", "is_warned"), [(0, False), (3, False), (9, True), (10, True)])
def test_a_second_large_part_of_a_mask_is_a_warning(tmp_path, tiny_base, second, is_warned):
    """Ten columns, and apart from them some more: from 0.4 of the larger part's area it may be another subject."""
    (path,) = noisy_images(tmp_path, 1)
    mask = np.zeros((40, 50), np.uint8)
    mask[5:35, 5:15] = 255
    mask[5:35, 30 : 30 + second] = 255
    Image.fromarray(mask).save(path.with_name("000.mask.png"))
    params = tiny_params(tiny_base)
    (example,) = instance_examples(tmp_path, params.concepts["cat"], params.prepare, CPU)
    np.testing.assert_array_equal(example.mask.coverage * 255, mask)
    assert any("two subjects" in note for note in example.notes) is is_warned
