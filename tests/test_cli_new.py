"""`customdiff new`: from photos to a params.yaml that the pipeline accepts; mistakes leave everything as it was."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from typer.testing import CliRunner

from customdiff import cli, config
from customdiff.errors import UserError
from customdiff.files import sha256
from customdiff.new_concept import adding
from stages import inputs as inputs_stage

PHOTOS = ROOT / "data/concepts/teapot"


def run(*arguments, answers: str = ""):
    """One call of the command line inside this process; a UserError stays an exception."""
    result = CliRunner().invoke(cli.commands, ["new", *map(str, arguments)], input=answers)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder with the repository's params.yaml, models and prompts, the example cat, no captioner."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "data/concepts/cat", folder / "data/concepts/cat")
    for name in ("base", "clip", "holdout", "identity", "judge", "pool", "prompts", "segmenter"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    text = (ROOT / "params.yaml").read_text().replace("\nprepare:\n", "\nprepare:\n  captioner: null\n")
    (folder / "params.yaml").write_text(text)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five photos of a teapot, without captions."""
    return Path(shutil.copytree(PHOTOS, tmp_path / "photos", ignore=shutil.ignore_patterns("*.txt", "*.md")))


def state(folder: Path) -> dict[str, str]:
    real = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): sha256(path) for path in real}


def test_the_result_is_what_the_pipeline_takes(project, photos):
    before, originals = (project / "params.yaml").read_bytes(), state(photos)
    output = run("potty", photos, "--class", "teapot")
    assert (project / "params.yaml.bak").read_bytes() == before
    params = config.load()
    assert params.concepts["cat"] == config.load(ROOT / "params.yaml").concepts["cat"]
    potty = params.concepts["potty"]
    assert (potty.source.path, potty.modifier_token, potty.class_prompt) == ("data/concepts/potty", "<new2>", "teapot")
    assert potty.caption == "photo of a <new2> teapot"
    assert params.validation_prompts == [f"photo of a {x} on a red background" for x in ("<new1> cat", "<new2> teapot")]
    assert state(project / "data/concepts/potty") == originals == state(photos)
    inputs_stage.main()
    assert (project / "data/inputs/prepare/potty.json").is_file()

    sheet = Image.open(project / "data/concepts/potty-sheet.jpg")
    assert sheet.height > 5 * 160
    assert all(f"{number:02d}.png: 'photo of a <new2> teapot' (" in output for number in range(1, 6))
    assert output.count("mask: segmenter") == 5
    assert "cat (<new1>)" in output
    assert "--only" in output  # how to train it without the example
    assert output.rstrip().endswith("dvc repro")


def test_only_trains_it_alone(project, photos):
    output = run(
        "potty", photos / "01.png", *sorted(photos.glob("0[2-5].png")), "--class", "teapot", "--only", "--no-sheet"
    )
    params = config.load()
    assert list(params.concepts) == ["potty"]
    assert params.validation_prompts == ["photo of a <new1> teapot on a red background"]
    assert "removed: cat" in output
    assert not (project / "data/concepts/potty-sheet.jpg").exists()
    assert (project / "data/concepts/cat/01.png").exists()


def test_photos_that_are_not_copied_are_named(project, photos):
    run("potty", photos, "--class", "teapot", "--no-copy", "--no-sheet", "--token", "<pot>")
    assert not (project / "data/concepts/potty").exists()
    potty = config.load().concepts["potty"]
    assert (potty.source.path, potty.modifier_token) == (photos.as_posix(), "<pot>")
    inputs_stage.main()


def test_a_second_call_needs_replace_and_keeps_the_token(project, photos):
    run("potty", photos, "--class", "teapot")
    first = state(project)
    with pytest.raises(UserError, match="--replace"):
        run("potty", photos, "--class", "mug", "--no-sheet")
    assert state(project) == first
    (photos / "05.png").unlink()
    run("potty", photos, "--class", "mug", "--no-sheet", "--replace")
    assert len(list((project / "data/concepts/potty").iterdir())) == 4
    assert not (project / "data/concepts/potty-sheet.jpg").exists()  # it showed the old photos
    potty = config.load().concepts["potty"]
    assert (potty.class_prompt, potty.modifier_token) == ("mug", "<new2>")
    assert (project / "params.yaml.bak2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("../x", "{photos}", "--class", "teapot"), "^NAME: '../x'"),
        (("a b", "{photos}", "--class", "teapot"), "^NAME: 'a b'"),
        (("cat", "{photos}", "--class", "teapot"), "^NAME: params.yaml has a concept cat already"),
        (("pot", "{photos}/01.png", "--class", "teapot"), r"1 good image, but download\.minimum is 4"),
        (("pot", "{photos}/bad", "--class", "teapot"), r"0 good images.*a\.png: .*; b\.jpg: "),
        (("pot", "{photos}/none", "--class", "teapot"), "^PHOTOS: .*none does not exist"),
        (("pot", "{photos}", "--class", "a {} b"), r"concepts\.pot\.instance_prompt: must contain \{\} once"),
        (("pot", "{photos}", "--class", "  "), "^--class: is empty"),
        (("pot", "{photos}", "--class", "pot", "--token", "<new1>"), "modifier_token <new1> is used twice"),
        (("pot", "{photos}", "--class", "pot", "--token", "a b"), r"concepts\.pot\.modifier_token"),
        (("pot", "{photos}/01.png", "--class", "pot", "--no-copy"), "^PHOTOS: --no-copy needs one folder"),
        (("cat", "data/concepts/cat", "--class", "cat", "--replace"), "^PHOTOS: .*--no-copy"),
        (("pot", "{photos}"), r"^--class: is needed; data/clip proposes \w+ \(\d+%\), \w+ .*--yes"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(project, photos, arguments, message):
    (photos.parent / "photos/bad").mkdir()
    for name in ("a.png", "b.jpg", "c.jpg", "d.png"):
        (photos / "bad" / name).write_bytes(b"<html>")
    before = state(project)
    with pytest.raises(UserError, match=message) as error:
        run(*(argument.format(photos=photos) if "{photos}" in argument else argument for argument in arguments))
    assert "\n" not in str(error.value)
    assert state(project) == before


def test_a_caption_of_another_token_is_named_by_its_own_file(project, photos):
    (photos / "03.txt").write_text("a <ours> teapot")
    before = state(project)
    with pytest.raises(UserError, match=r"^03\.txt: the caption must contain \{\} or <new2>.*--no-sheet"):
        run("pot", photos, "--class", "teapot")
    assert state(project) == before


def test_the_class_is_proposed_and_confirmed(project, photos, monkeypatch):
    output = run("pot", photos, "--no-sheet", "--yes")
    first = config.load().concepts["pot"].class_prompt
    assert f"{first} (" in output
    monkeypatch.setattr("customdiff.cli.new._is_terminal", lambda: True)
    run("pot2", photos, "--no-sheet", answers="\n")
    assert config.load().concepts["pot2"].class_prompt == first
    output = run("pot3", photos, "--no-sheet", answers="tea pot\n")
    assert config.load().concepts["pot3"].class_prompt == "tea pot"
    assert "did you mean teapot?" in output


def test_an_edit_meanwhile_is_not_overwritten(project, photos, monkeypatch):
    def edit(*arguments, examples=adding.examples):
        Path("params.yaml").write_text(edited)
        return examples(*arguments)

    edited = Path("params.yaml").read_text().replace("max_steps: 400", "max_steps: 401")
    monkeypatch.setattr(adding, "examples", edit)
    with pytest.raises(UserError, match=r"params\.yaml: was edited outside"):
        run("potty", photos, "--class", "teapot")
    assert Path("params.yaml").read_text() == edited
    assert not Path("data/concepts/potty").exists()


def test_bad_photos_are_reported_and_not_copied(project, photos):
    (photos / "06.jpg").write_bytes(b"\xff\xd8\xff broken")
    output = run("pot", photos, "--class", "teapot", "--no-sheet")
    assert "set aside: 06.jpg: " in output
    assert sorted(state(project / "data/concepts/pot")) == [f"0{number}.png" for number in range(1, 6)]


def test_the_example_that_was_never_copied_is_named(project, photos):
    shutil.copy2(ROOT / "customdiff/presets/sd14-cat.yaml", project / "params.yaml")
    output = run("rex", photos, "--class", "dog", "--no-sheet")
    assert "data/concepts/my-cat does not exist" in output
