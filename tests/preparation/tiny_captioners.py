"""Tiny captioners of random weights, one for each way in which a captioner is asked."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SENTENCE = (
    "photo of a an cat dog on in the grass red snow background write one short caption this begin with then say where "
    "is what around it does light and framing do not itself looks like leave out its color pattern material breed "
    "answer only describe image"
)
WORDS = SENTENCE.split(" ")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 32, "patch_size": 16}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts `<s>` before a text and `</s>` behind it."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **names)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _images(side: int = 32, **settings) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, **settings)


def blip(folder: Path) -> Path:
    """BLIP continues a caption."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "words.txt").write_text("\n".join(dict.fromkeys(words)))
    tokenizer = BertTokenizer(str(folder / "words.txt"), bos_token="[DEC]")
    ids = {"bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    config = BlipConfig(text_config=SIZES | {"vocab_size": len(tokenizer)} | ids, vision_config=VISION)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    """GIT continues a caption, with image and text in one sequence."""
    tokenizer = word_tokenizer()
    config = GitConfig(vision_config=VISION, vocab_size=len(tokenizer), **SIZES, **_ids(tokenizer))
    GitForCausalLM(config).save_pretrained(folder)
    GitProcessor(_images(), tokenizer).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """LLaVA answers an instruction in a chat."""
    tokenizer = word_tokenizer()
    text = SIZES | {"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2} | _ids(tokenizer)
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        _images(crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def florence2(folder: Path) -> Path:
    """Florence-2 is asked by a task token."""
    tokenizer = word_tokenizer()
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_start_token_id": tokenizer.eos_token_id,
    } | _ids(tokenizer)
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 8, 8],
        "num_heads": [1, 1, 1, 1],
        "num_groups": [1, 1, 1, 1],
        "window_size": 2,
        "projection_dim": 16,
    }
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    # 64 px in four halvings after the first stride of 4: 2 x 2 features, and their mean
    Florence2Processor(_images(64, image_seq_length=5), tokenizer).save_pretrained(folder)
    return folder


CAPTIONERS = {"blip": blip, "git": git, "llava": llava, "florence2": florence2}


def make(name: str, folder: Path) -> Path:
    """One of `CAPTIONERS`, always with the same weights."""
    torch.manual_seed(0)
    return CAPTIONERS[name](folder)
