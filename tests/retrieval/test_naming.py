"""Which captions name a class; the cases are worked by hand."""

import pytest

from customdiff.retrieval.naming import names_class


@pytest.mark.parametrize(
    ("class_prompt", "caption", "expected"),
    [
        ("dog", "a dog on the grass", True),
        ("dog", "Two DOGS, playing", True),
        ("dog", "the dog's bowl", True),
        ("dog", "a hotdog", False),
        ("dog", "dogma", False),
        ("dog", "", False),
        ("cat", "a caterpillar and a cattle", False),
        ("teapot", "teapots!", True),
        ("box", "boxes", True),
        ("cherry", "three cherries", True),
        ("leaf", "autumn leaves", True),
        ("knife", "knives", True),
        ("woman", "two women", True),
        ("person", "people at the beach", True),
        ("mouse", "a pair of mice", True),
        ("fish", "two fish", True),
        ("wooden pot", "a Wooden  pot", True),
        ("wooden pot", "wooden-pots", True),
        ("wooden pot", "a pot that is wooden", False),
        ("wooden pot", "a wooden pothole", False),
        ("teddybear (plush)", "a teddybear (plush) on a bed", True),
        ("c.t", "a cat", False),
        ("café", "two cafés", True),
        ("caf", "café", False),
        (" ", "a cat", False),
    ],
)
def test_captions_name_a_class_by_whole_words(class_prompt, caption, expected):
    assert names_class(class_prompt)(caption) is expected
