"""The tokenizer: byte-level BPE in CLIP's own form, its merges learned from the world's captions."""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from world.loop import load_params
from world.scenes import Sprites, compose, world_distribution

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def learn_merges(captions: list[str], size: int) -> list[tuple[str, str]]:
    """The merges of byte-level BPE with CLIP's word ends, at most `size` of them."""
    clip = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def build(captions: list[str], size: int, length: int) -> CLIPTokenizer:
    """A CLIPTokenizer of these captions.

    The end token has the largest id and never id 2: transformers pools such a model by a legacy rule (at the largest
    id), which only agrees with pooling at the end token while the end token is the largest. Padding has a token of its
    own, so that pad and end can be told apart.
    """
    merges = learn_merges(captions, size)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, START, PAD, END]))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=PAD, unk_token=END, model_max_length=length, padding_side="right"
    )


def main() -> None:
    """Learn the tokenizer from the captions of the base's split and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    work = parser.parse_args().work
    params = load_params("tokenizer")
    sprites = Sprites.load(work / "sprites")
    of = world_distribution(sprites)
    captions = [compose(sprites, of, "base", i).caption for i in range(params["captions"])]
    tokenizer = build(captions, params["vocabulary"], params["length"])
    tokenizer.save_pretrained(work / "tokenizer")
    longest = max(len(ids) for ids in tokenizer(captions)["input_ids"])
    print(f"{len(tokenizer)} tokens, the longest caption takes {longest} of {params['length']}")


if __name__ == "__main__":
    main()
