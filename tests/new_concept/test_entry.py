"""A concept's entry is written into the text of params.yaml, whose other characters stay."""

import difflib

import pytest
import yaml
from conftest import ROOT, concept_values

from customdiff import config
from customdiff.config import Concept
from customdiff.errors import UserError
from customdiff.new_concept import entry

REX = entry.new_entry("data/concepts/rex", "<new9>", "dog")
PRESETS = sorted((ROOT / "customdiff/presets").glob("*.yaml"))
ODD = """\ufeff# Indented by four, with quotes, odd spaces and comments everywhere.
concepts:   # ours

    # the first
    "tom" :
        source:   { path: 'cats, all' , subfolder: x }  # where they lie
        modifier_token:   <new1>   # his
        class_prompt: cat
        instance_prompt: >-
            photo of
            a {} cat   # not a comment

    # about the next section

train:   {max_steps: 0x10, learning_rate: 1.50e-4,
          validation: {prompts: [ a <new1> cat on 'grass' ,  "the <new1>!", no token ], every: 5}}
prepare: {backgrounds: {colors:   [red,
   blue]}}   # the end, without a newline"""


def added_and_removed(old: str, new: str) -> tuple[list[str], list[str]]:
    lines = list(difflib.ndiff(old.splitlines(), new.splitlines()))
    return tuple([line[2:] for line in lines if line.startswith(sign)] for sign in ("+ ", "- "))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_only_the_lines_of_the_entry_are_new(path):
    old = path.read_text()
    added, removed = added_and_removed(old, entry.with_concept(old, "rex", REX))
    assert removed == []
    assert added == [
        *("  rex:", "    source:", "      path: data/concepts/rex", "    modifier_token: <new9>"),
        *("    class_prompt: dog", "    instance_prompt: photo of a {} dog", "    initializer_token: dog"),
    ]


def test_an_oddly_written_file_keeps_every_other_character():
    new = entry.with_concept(ODD, "rex", REX)
    assert yaml.safe_load(new)["concepts"] == yaml.safe_load(ODD)["concepts"] | {"rex": REX}
    added, removed = added_and_removed(ODD, new)
    assert added[:2] == ["    rex:", "      source:"]
    prompts = "[ a <new1> cat on 'grass' ,  \"the <new1>!\", no token ]"
    general = '[ "a {} on \'grass\'" ,  "the {}!", no token ]'
    assert [line.replace(prompts, general) for line in removed] == [line for line in added if "validation" in line]
    assert new.endswith("# the end, without a newline")


def test_comments_behind_the_last_value_stay_with_it():
    old = yaml.safe_dump({"concepts": {"cat": concept_values()}}, sort_keys=False).rstrip()
    old += "   # why\n    # more\n\ntrain: {}\n"
    new = entry.with_concept(old, "rex", REX)
    assert new.partition("   # why\n")[0] == old.partition("   # why\n")[0]
    assert new.endswith("    # more\n\ntrain: {}\n")
    assert "# why" not in entry.with_concept(old, "rex", REX, only=True)


def test_line_ends_of_windows_stay():
    old = ODD.replace("\n", "\r\n")
    new = entry.with_concept(old, "rex", REX)
    assert new.count("\n") == new.count("\r\n") == ODD.count("\n") + 7
    assert new == entry.with_concept(ODD, "rex", REX).replace("\n", "\r\n")


def test_a_file_in_one_line_gets_an_entry_in_one_line():
    cat = '{source: {path: cats}, modifier_token: <new1>, class_prompt: cat, instance_prompt: "a {} cat"}'
    old = f"{{concepts: {{cat: {cat}}}}}"
    new = entry.with_concept(old, "rex", REX)
    assert new.startswith(old[:-2])
    assert list(config.parse(new).concepts) == ["cat", "rex"]
    assert list(config.parse(entry.with_concept(old, "rex", REX, only=True)).concepts) == ["rex"]


def test_an_entry_of_the_same_name_is_replaced_in_its_place():
    old = (ROOT / "customdiff/presets/embedded-two-concepts.yaml").read_text()
    new = entry.with_concept(old, "cat", REX)
    assert list(yaml.safe_load(new)["concepts"]) == ["cat", "teapot"]
    assert yaml.safe_load(new)["concepts"]["cat"] == REX
    _, removed = added_and_removed(old, new)
    assert all("cat" in line or "<new1>" in line for line in removed)


def test_only_removes_the_other_concepts_and_nothing_else():
    new = entry.with_concept(ODD, "rex", REX, only=True)
    assert yaml.safe_load(new)["concepts"] == {"rex": REX}
    for comment in (
        "# ours",
        "# the first",
        "# about the next section",
        "# the end",
        "0x10",
        "1.50e-4",
        "[red,\n   blue]",
    ):
        assert comment in new


@pytest.mark.parametrize(
    ("prompt", "general"),
    [
        ("a <new1> cat on red", "a {} on red"),
        ("<new1> asleep", "{} asleep"),
        ("a sks dog, asks", "a {}, asks"),
        ("a <new1> cat and a sks dog", "a <new1> cat and a sks dog"),
        ("asks <3", "asks <3"),
        ("a {} and <new1> cat", "a {} and {}"),
    ],
)
def test_a_prompt_about_one_concept_is_made_general(prompt, general):
    concepts = {"tom": concept_values(), "rex": concept_values("sks", "dog")}
    old = yaml.safe_dump({"concepts": concepts, "train": {"validation": {"prompts": ["first", prompt]}}})
    new = yaml.safe_load(entry.with_concept(old, "max", REX))
    assert new["train"]["validation"]["prompts"] == ["first", general]


def test_a_file_that_repeats_entries_by_alias_keeps_its_meaning_or_is_refused():
    old = "concepts:\n  cat: &c\n    source: &s {path: p}\n    modifier_token: <a>\n    class_prompt: cat\n"
    old += "    instance_prompt: a {} cat\n  dog:\n    <<: *c\n    modifier_token: <b>\n"
    assert yaml.safe_load(entry.with_concept(old, "rex", REX))["concepts"].keys() == {"cat", "dog", "rex"}
    with pytest.raises(UserError, match=r"concepts\.cat by hand"):
        entry.with_concept(old, "cat", REX)


def test_the_token_is_the_first_free_one():
    def concepts(*tokens):
        return {token.strip("<>"): Concept.model_validate(concept_values(token)) for token in tokens}

    assert entry.free_token({}) == "<new1>"
    assert entry.free_token(concepts("<new1>", "<new3>")) == "<new2>"
    assert entry.free_token(concepts("<new2>", "sks")) == "<new1>"


@pytest.mark.parametrize(
    "name", ["../x", "a b", "", ".", "Rex", "a/b", "-rf", "$(id)", "a;b", "rex\n", "é", "a" + "\0"]
)
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(UserError, match=r"^NAME: ") as error:
        entry.check_name(name)
    assert "\n" not in str(error.value)


def test_ordinary_names_are_accepted():
    for name in ("rex", "my-cat", "cat_2", "7"):
        entry.check_name(name)
