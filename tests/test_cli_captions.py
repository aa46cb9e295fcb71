"""`customdiff captions`: what it shows, and the caption files that it writes beside photos."""

import pytest
import yaml
from conftest import concept_values, noisy_images
from typer.testing import CliRunner

from customdiff import cli
from customdiff.errors import UserError
from customdiff.preparation import captions


class Captioner:
    """A captioner that says the same of every photo."""

    def __init__(self, *arguments) -> None: ...

    def captions(self, images, class_prompt):
        return [f"photo of a {class_prompt} on grass"] * len(images)


@pytest.fixture
def project(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captions, "Captioner", Captioner)
    noisy_images(tmp_path / "photos", 4)
    (tmp_path / "photos/001.txt").write_text("a {} cat\n")
    concept = concept_values("<new1>") | {"source": {"path": "photos"}}
    write_params(tiny_base, concept)
    return lambda **changes: write_params(tiny_base, concept | changes)


def write_params(base, concept):
    values = {"base": {"model": str(base), "device": "cpu"}, "concepts": {"tom": concept}}
    with open("params.yaml", "w") as file:
        yaml.safe_dump(values, file)


def run(*arguments):
    result = CliRunner().invoke(cli.commands, ["captions", *arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_captions_are_shown_by_the_photos_own_names(project):
    shown = run()
    assert "001.png: a <new1> cat  (sidecar)" in shown
    assert shown.count("photo of a <new1> cat on grass  (captioner)") == 3


def test_only_photos_without_a_caption_get_a_file_unless_forced(project, tmp_path):
    shown = run("tom", "--write")
    texts = {path.name: path.read_text() for path in sorted((tmp_path / "photos").glob("*.txt"))}
    described = "photo of a {} cat on grass\n"
    assert texts == {"000.txt": described, "001.txt": "a {} cat\n", "002.txt": described, "003.txt": described}
    assert shown.count("wrote") == 3
    assert "(captioner)" not in run()
    run("tom", "--write", "--force")
    assert (tmp_path / "photos/001.txt").read_text() == described


def test_captions_are_written_beside_photos_in_a_folder_only(project):
    project(source={"url": "https://example.org/photos.zip"})
    with pytest.raises(UserError, match=r"concepts\.tom\.source"):
        run("tom", "--write")
    with pytest.raises(UserError, match="concepts: 'rex'"):
        run("rex")
