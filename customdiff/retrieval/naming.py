"""Whether a caption names a class, as whole words, in the singular or the plural."""

import re
from collections.abc import Callable

IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "mouse": "mice",
    "person": "people",
    "tooth": "teeth",
}


def names_class(class_prompt: str) -> Callable[[str], bool]:
    """A test of captions: whether they have the class prompt or its plural as whole words, in either case.

    Words of a class prompt may be joined by spaces or hyphens. The last word may be plural: regular nouns, -man and
    `IRREGULAR`. The test does not know what a word means: "an orange background" names an orange.

    Args:
        class_prompt: "dog", or several words such as "wooden pot".

    Returns:
        A function from a caption to whether it names the class.
    """
    *first, last = class_prompt.split() or [class_prompt]
    head = "".join(rf"{re.escape(word)}[\s-]+" for word in first)
    forms = "|".join(map(re.escape, (last, *_plurals(last))))
    pattern = re.compile(rf"(?<!\w){head}(?:{forms})(?!\w)", re.IGNORECASE)
    return lambda caption: pattern.search(caption) is not None


def _plurals(noun: str) -> list[str]:
    """Possible plurals of an English noun; a form that does not exist does no harm."""
    low = noun.lower()
    plurals = [f"{noun}s", f"{noun}es"]
    if low in IRREGULAR:
        plurals.append(IRREGULAR[low])
    for end, plural in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("man", "men")):
        if low.endswith(end):
            plurals.append(noun[: -len(end)] + plural)
    return plurals
