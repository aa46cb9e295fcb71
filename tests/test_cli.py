"""What a user types, and what comes of it: files, lines, exit statuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import concept_values
from PIL import Image
from typer.testing import CliRunner

from customdiff import cli
from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models import attention, modifier_tokens
from customdiff.models import base as base_model

ROOT = Path(__file__).resolve().parent.parent
PARAMS = """# A cat. Learned {how}.
concepts:
  cat:
    source: {{path: cats}}
    modifier_token: <new1>
    class_prompt: cat
    instance_prompt: photo of a {{}} cat
"""


def run(*arguments):
    """One call of the command line inside this process; a UserError stays an exception."""
    return CliRunner().invoke(cli.commands, list(arguments))


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """Two presets, and an empty folder to stand in."""
    folder, work = tmp_path / "presets", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    for name in ("fast", "slow"):
        (folder / f"{name}.yaml").write_text(PARAMS.format(how=name))
    monkeypatch.setattr("customdiff.new_concept.presets.PRESETS", folder)
    monkeypatch.chdir(work)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_base):
    """An adapter on the tiny base, with weights far from the base's own."""
    folder = tmp_path_factory.mktemp("learned")
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    torch.manual_seed(0)
    modifier_tokens.add_tokens(pipe, {"<new1>": {"text_encoder": torch.randn(pipe.text_encoder.config.hidden_size)}})
    for weight in attention.inject_processors(pipe.unet, "crossattn_kv").values():
        weight.data.normal_()
    concept = {"modifier_token": "<new1>", "class_prompt": "cat"}
    config = {"base": {"model": str(tiny_base), "revision": None, "variant": None}, "concepts": {"cat": concept}}
    adapter.save(
        adapter.from_pipeline(
            pipe, AdapterConfig.model_validate(config | {"method": "custom_diffusion", "freeze_model": "crossattn_kv"})
        ),
        folder,
    )
    return folder


def test_sample_draws_each_prompt_and_seed_as_the_pipeline_does(learned, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "samples"
    result = run(
        *("sample", "<new1> cat", "red pot", "--adapter", str(learned), "--out", str(out)),
        *("--num-images", "2", "--seed", "7", "--steps", "2", "--device", "cpu", "--batch-size", "3"),
    )
    assert result.exit_code == 0, result.output
    assert "4 images" in result.output
    names = {path.name for path in out.iterdir()}
    files = {f"{slug}-seed{seed}.png" for slug in ("1-new1-cat", "2-red-pot") for seed in (7, 8)}
    assert names == {"grid.png", *files}
    assert Image.open(out / "grid.png").size == (68, 68)

    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    adapter.load(pipe, learned)
    drawn = pipe(
        "<new1> cat", num_inference_steps=2, guidance_scale=6.0, eta=1.0, generator=torch.Generator().manual_seed(8)
    ).images[0]
    ours = np.asarray(Image.open(out / "1-new1-cat-seed8.png"), float)
    assert np.abs(ours - np.asarray(drawn, float)).max() <= 1


def test_sample_takes_its_settings_from_params_unless_they_are_options(learned, tmp_path, monkeypatch):
    """So that it draws what was graded."""
    monkeypatch.chdir(tmp_path)
    graded = {"steps": 2, "guidance_scale": 1.5, "eta": 0.5, "scheduler": "ddim"}
    drawn = {}
    for name, settings in (("params", graded), ("options", {}), ("other", graded | {"guidance_scale": 3.0})):
        values = {"concepts": {"cat": concept_values()}, "evaluate": settings}
        Path("params.yaml").write_text(yaml.safe_dump(values))
        given = ["--steps", "2", "--guidance-scale", "1.5", "--eta", "0.5"] if name == "options" else []
        result = run("sample", "a <new1> cat", "--adapter", str(learned), "--out", name, *given)
        assert result.exit_code == 0, result.output
        drawn[name] = Path(name, "grid.png").read_bytes()
    assert drawn["params"] == drawn["options"] != drawn["other"]


def test_sample_notes_that_no_prompt_names_the_concept(learned, tmp_path):
    result = run("sample", "a cat", "--adapter", str(learned), "--out", str(tmp_path), "--steps", "1")
    assert result.exit_code == 0
    assert "<new1>" in result.output


def test_sample_keeps_the_images_that_exist(learned, tmp_path):
    """The same image is written once; another one of the same name gets a name of its own."""
    for steps in ("1", "1", "2"):
        result = run("sample", "<new1>", "--adapter", str(learned), "--out", str(tmp_path), "--steps", steps)
        assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"1-new1-seed42.png", "1-new1-seed42-2.png", "grid.png", "grid-2.png"}
    assert "grid-2.png" in result.output


@pytest.fixture
def trainings(learned, tmp_path, monkeypatch):
    """Two runs: `late` with steps 2 and 10, begun an hour after `early` with step 4; no two checkpoints are alike."""
    monkeypatch.chdir(tmp_path)
    for number, (run_name, step) in enumerate((("early", 4), ("late", 2), ("late", 10))):
        folder = tmp_path / ".checkpoints" / run_name / f"step-{step:06d}"
        shutil.copytree(learned, folder)
        changed = adapter.read(folder)
        for weight in changed.weights.values():
            weight *= 1 + number
        adapter.save(changed, folder)
        (folder / "state.pt").write_text("never read here")
        identity = folder.parent / "identity.json"
        identity.write_text('{"train": {"max_steps": 12}}')
        os.utime(identity, (1_700_000_000 + 3600 * (run_name == "late"),) * 2)
    (tmp_path / ".checkpoints/late/step-000012.incoming").mkdir()  # of a training that was killed while it wrote
    (tmp_path / ".checkpoints/early/complete").touch()
    (tmp_path / ".checkpoints/nothing-yet").mkdir()
    (tmp_path / ".checkpoints/accelerate.yaml").touch()
    return tmp_path / ".checkpoints"


@pytest.mark.parametrize(
    ("named", "folder", "note"),
    [
        ("2", "late/step-000002", "using .checkpoints/late/step-000002, of the last of 2 runs"),
        ("latest", "late/step-000010", "using .checkpoints/late/step-000010, of the last of 2 runs"),
        (".checkpoints/early", "early/step-000004", "using .checkpoints/early/step-000004\n"),
        (".checkpoints/early/step-000004", "early/step-000004", ""),
    ],
)
def test_sample_uses_the_named_checkpoint(trainings, named, folder, note):
    settings = ["--steps", "1", "--device", "cpu"]
    result = run("sample", "a <new1> cat", "--checkpoint", named, "--out", "named", *settings)
    assert result.exit_code == 0, result.output
    assert note in result.output
    assert ("using" in result.output) == bool(note)
    run("sample", "a <new1> cat", "--adapter", str(trainings / folder), "--out", "direct", *settings)
    drawn = {path.parent.name: path.read_bytes() for path in Path(".").glob("*/1-*.png")}
    assert drawn["named"] == drawn["direct"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "7"], r"^\.checkpoints/late: has no checkpoint of step 7; it has 2, 10$"),
        (["--checkpoint", "no/such"], r"^no/such: .*`customdiff checkpoints`"),
        (["--checkpoint", ".checkpoints/late/step-000099"], r"step-000099: "),
        (["--checkpoint", "2", "--adapter", "mine"], r"^--checkpoint: .*--adapter"),
    ],
)
def test_a_missing_checkpoint_is_a_user_error(trainings, arguments, message):
    result = run("sample", "a cat", *arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not Path("samples").exists()


def test_checkpoints_are_listed_the_last_training_first(trainings):
    lines = run("checkpoints").output.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [".checkpoints/late", ".checkpoints/early"]
    assert [line.strip() for line in lines[1::2]] == ["steps 2, 10", "steps 4"]
    assert "10 of 12 steps" in lines[0]
    (trainings / "late/step-000010/grade.json").write_text('{"score": 0.61249}')
    assert "steps 2, 10 (score 0.612)" in run("checkpoints").output
    assert lines[0].endswith(", 10 of 12 steps")
    assert lines[2].endswith(", complete")
    assert "<new1>" in lines[0]


def test_missing_checkpoints_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["checkpoints"], ["sweep"], ["sample", "a cat", "--checkpoint", "latest"]):
        assert ".checkpoints: no checkpoints" in str(run(*arguments).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "./no/such"], "no/such/adapter.json"),
        (["--height", "60"], "--height: .*8 .*60.* 56"),
        (["--device", "gpu"], "--device: must be auto"),
    ],
)
def test_invalid_options_of_sample_are_user_errors(arguments, message):
    result = run("sample", "a cat", *arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_an_option_out_of_range_is_named():
    result = run("sample", "a cat", "--eta", "2")
    assert result.exit_code == 2
    assert "--eta" in result.output


def test_preset_lists_prints_and_names_what_is_not_there(presets):
    listed = run("preset").output.splitlines()
    assert listed == ["fast  A cat.", "slow  A cat."]
    assert run("preset", "fast").output == (presets / "fast.yaml").read_text()
    assert "fats; use one of fast, slow" in str(run("preset", "fats").exception)
    assert not Path("params.yaml").exists()


def test_install_writes_params_and_switches_between_presets_without_force(presets):
    assert run("preset", "fast", "--install").output == "params.yaml is now preset fast\n"
    assert run("preset", "fast", "--install").output == "params.yaml is already preset fast\n"
    assert not Path("params.yaml.bak").exists()
    assert "kept as params.yaml.bak" in run("preset", "slow", "--install").output
    assert Path("params.yaml").read_text() == (presets / "slow.yaml").read_text()
    assert Path("params.yaml.bak").read_text() == (presets / "fast.yaml").read_text()


def test_an_edited_file_is_replaced_only_by_force_and_every_old_one_is_kept(presets):
    for edit in ("first", "second"):
        Path("params.yaml").write_text(edit)
        refused = run("preset", "fast", "--install")
        assert "--force" in str(refused.exception)
        assert Path("params.yaml").read_text() == edit
        assert run("preset", "fast", "--install", "--force").exit_code == 0
        assert Path("params.yaml").read_text() == (presets / "fast.yaml").read_text()
    assert Path("params.yaml.bak").read_text() == "first"
    assert Path("params.yaml.bak2").read_text() == "second"


def test_a_preset_that_is_no_longer_valid_is_not_installed(presets):
    (presets / "fast.yaml").write_text("concepts: {}\n")
    assert isinstance(run("preset", "fast", "--install").exception, UserError)
    assert not Path("params.yaml").exists()


def test_every_preset_of_the_project_is_valid():
    names = [path.stem for path in (ROOT / "customdiff/presets").glob("*.yaml")]
    assert {"embedded", "sd14-cat", "sd14-cat-and-wooden-pot", "faces"} <= set(names)
    for name in names:
        assert run("check", str(ROOT / "customdiff/presets" / f"{name}.yaml")).exit_code == 0, name


def test_check_names_each_wrong_key(presets):
    Path("params.yaml").write_text(PARAMS.format(how="x") + "train: {learning_rte: 1, max_steps: 0}\n")
    message = str(run("check").exception)
    assert "train.learning_rte: unknown key; did you mean learning_rate?" in message
    assert "train.max_steps" in message
    Path("params.yaml").write_text(PARAMS.format(how="x"))
    output = run("check").output
    assert all(value in output for value in ("params.yaml: valid", "cat (<new1>)", "data/base", "250 steps"))


def test_the_program_ends_with_one_line_and_status_1():
    command = [sys.executable, "-m", "customdiff.cli", "check", "no-such-file.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no-such-file.yaml: cannot be read")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_help_does_not_wait_for_torch():
    code = "import sys; from customdiff import cli; sys.exit(bool({'torch', 'diffusers', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert "customdiff sample" in run("sample", "--help").output


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<new1> cat, asleep", "new1-cat-asleep"), ("///", "image"), ("../../x", "x"), ("é" * 200, "é" * 40)],
)
def test_a_prompt_makes_a_harmless_file_name(prompt, expected):
    assert cli.sample.slug(prompt) == expected


def test_the_grid_keeps_every_image_in_its_row():
    images = [Image.new("RGB", (4, 2), (shade, 0, 0)) for shade in range(6)]
    sheet = np.asarray(cli.sample.grid(images, 3))
    assert sheet.shape == (2 * 2 + 4, 3 * 4 + 2 * 4, 3)
    assert [sheet[y, x, 0] for y in (0, 6) for x in (0, 8, 16)] == [0, 1, 2, 3, 4, 5]


def test_the_page_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"params\.yaml: cannot be read"):
        cli.page.page()
    (tmp_path / "params.yaml").write_text(PARAMS.format(how="fast"))
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(UserError, match=r"customdiff\[app\]"):
        cli.page.page()
