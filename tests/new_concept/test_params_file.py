"""Edits of params.yaml: only the named values change, and nobody's edit is overwritten."""

import pytest
import yaml
from conftest import ROOT

from customdiff import config
from customdiff.errors import UserError
from customdiff.new_concept.params_file import ChangedOutsideError, ParamsFile, with_concepts_of, with_values
from customdiff.new_concept.presets import first_sentence, presets

TEXT = (ROOT / "params.yaml").read_text()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "params.yaml").write_text(TEXT)
    return ParamsFile.read(tmp_path / "params.yaml")


def changed_lines(before: str, after: str) -> list[tuple[str, str]]:
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    return [(old.strip(), new.strip()) for old, new in pairs if old != new]


def test_only_the_named_values_change():
    edited = with_values(TEXT, {"train.max_steps": 30, "train.learning_rate": 1e-5, "base.seed": 42})
    assert changed_lines(TEXT, edited) == [
        ("max_steps: 400", "max_steps: 30"),
        ("learning_rate: 2.5e-4", "learning_rate: 1.0e-05"),
    ]
    params = config.parse(edited)
    assert (params.train.max_steps, params.train.learning_rate) == (30, 1e-5)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (TEXT, "train.optimizer"),  # a section without the key
        (TEXT.replace("\n", "\r\n"), "train.optimizer"),
        ("concepts: {}\ntrain: {max_steps: 5}  # short\n", "train.optimizer"),
        ("concepts: {}\ntrain: {}\n", "train.optimizer"),
        ("concepts: {}\n", "train.optimizer"),
    ],
    ids=["block", "windows", "flow", "empty", "no section"],
)
def test_a_missing_key_is_added_to_its_section(text, key):
    section, name = key.split(".")
    before = yaml.safe_load(text)
    edited = with_values(text, {key: "adamw"})
    expected = {**before, section: {**(before.get(section) or {}), name: "adamw"}}
    assert yaml.safe_load(edited) == expected
    assert all(line in edited.splitlines(keepends=True) for line in text.splitlines(keepends=True) if "{" not in line)


def test_what_cannot_be_edited_is_refused():
    aliased = "concepts: {}\ntrain: &t\n  max_steps: 5\nevaluate: *t\n"
    with pytest.raises(UserError, match=r"train\.max_steps by hand"):
        with_values(aliased, {"train.max_steps": 6})
    anchored = "concepts: {}\ntrain:\n  max_steps: &n 250\n  lr_warmup_steps: *n\n"
    with pytest.raises(UserError, match=r"train\.max_steps by hand"):
        with_values(anchored, {"train.max_steps": 6})


@pytest.mark.parametrize("name", presets())
def test_a_preset_takes_the_concepts(name):
    preset = presets()[name].read_text()
    edited = config.parse(with_concepts_of(TEXT, preset))
    original, own = config.parse(preset), config.parse(TEXT)
    assert edited.concepts == own.concepts
    assert edited.base == original.base
    assert edited.train.learning_rate == original.train.learning_rate
    assert first_sentence(presets()[name]).endswith(".")


def test_several_concepts_are_all_kept():
    two = presets()["embedded-two-concepts"].read_text()
    assert list(config.parse(with_concepts_of(two, TEXT)).concepts) == list(config.parse(two).concepts)


def test_an_edit_from_outside_is_not_overwritten(file):
    edited = with_values(file.text, {"train.max_steps": 30})
    assert "+  max_steps: 30" in file.difference(edited)
    theirs = TEXT.replace("seed: 42", "seed: 7")
    file.path.write_text(theirs)
    assert not file.is_current()
    with pytest.raises(ChangedOutsideError, match="edited outside") as error:
        file.write(edited)
    assert "+  seed: 7" in error.value.difference
    assert file.path.read_text() == theirs
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["params.yaml"]


def test_a_write_is_the_whole_file_or_nothing(file):
    with pytest.raises(UserError, match=r"train\.max_steps"):
        file.write(with_values(file.text, {"train.max_steps": 0}))
    assert file.path.read_text() == TEXT
    written = file.write(with_values(file.text, {"train.max_steps": 30}))
    assert written.is_current()
    assert written.params.train.max_steps == 30


def test_a_file_that_is_not_valid_is_not_read(file):
    file.path.write_text("train: {steps: 3}\n")
    with pytest.raises(UserError, match=r"params\.yaml"):
        ParamsFile.read(file.path)
