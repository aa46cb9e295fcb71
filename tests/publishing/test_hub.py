"""Push an adapter to a stand-in of the Hub and fetch it again; no pickle, path or token on the way."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters_on_disk import write_adapter
from conftest import tiny_params
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from hub_stand_in import READER, WRITER, Hub
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import customdiff
from customdiff import cli
from customdiff.adapters import adapter
from customdiff.errors import UserError
from customdiff.models import base
from customdiff.publishing import hub

ROOT = Path(__file__).resolve().parents[2]
REPO = "anna/grey-cat"
PROMPT = "photo of a <new1> cat"
WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
FILES = {"adapter.json", "README.md", WEIGHTS, "<new1>.safetensors", ".gitattributes"}


@pytest.fixture
def the_hub(monkeypatch, tmp_path):
    """A stand-in of the Hub, an empty cache, and a token that may write as `anna`.

    huggingface_hub reads its environment variables when it is imported, before the server has a port: their values
    in its module `constants` are replaced.
    """
    server = Hub()
    changes = {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_ASSETS_CACHE": str(tmp_path / "hf" / "assets"),
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield server
    server.close()


@pytest.fixture(scope="module")
def learned_once(tiny_base, tmp_path_factory):
    return write_adapter(tiny_base, tmp_path_factory.mktemp("learned") / "adapter")


@pytest.fixture
def learned(learned_once, tmp_path):
    """An adapter on the tiny base, in a folder of this test."""
    return Path(shutil.copytree(learned_once, tmp_path / "learned"))


def run(*arguments):
    """Run the command line in this process; a UserError stays an exception."""
    return CliRunner().invoke(cli.commands, [str(each) for each in arguments])


def push(folder, *arguments, repo=REPO):
    return run("push", repo, "--adapter", folder, "--license", "apache-2.0", *arguments)


def pushed(folder, *arguments, **options):
    """Output of a push that must succeed."""
    result = push(folder, *arguments, **options)
    assert result.exit_code == 0, result.exception
    return result.output


def sample(out, *arguments):
    """Pixels of one image that `customdiff sample` generates."""
    result = run("sample", PROMPT, "--out", out, "--steps", 2, "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.exception
    return np.asarray(Image.open(out / "grid.png"), float)


def draw(pipe, prompt=PROMPT):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, guidance_scale=6.0, generator=generator, output_type="np").images[0]


def plain(folder):
    pipe = base.load_pipeline(tiny_params(folder).base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# pushing


def test_a_push_is_one_commit_of_safe_files_into_a_private_repository(the_hub, learned):
    output = pushed(learned, "--message", "the first")
    repository = the_hub.repositories[REPO]
    assert set(repository.branches["main"]) == FILES
    assert repository.messages == ["the first"]
    assert repository.private
    assert output.splitlines()[-1].startswith(f"{the_hub.address}/{REPO} (private): commit ")
    for name in (WEIGHTS, "<new1>.safetensors"):
        assert repository.branches["main"][name] == (learned / name).read_bytes()
    assert not (learned / "README.md").exists()


def test_what_comes_back_draws_the_same_image(the_hub, learned, tiny_base, tmp_path):
    pushed(learned, "--base-model", "anna/base")
    drawn = sample(tmp_path / "here", "--adapter", learned)
    from_hub = sample(tmp_path / "there", "--adapter", REPO, "--base", tiny_base)
    np.testing.assert_array_equal(from_hub, drawn)
    without = sample(tmp_path / "without", "--adapter", learned, "--seed", 43)
    assert np.abs(without - drawn).max() > 1  # another seed is another image: the arrays above could have differed


def test_the_base_model_is_read_from_the_repository(the_hub, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_base.parent)
    folder = write_adapter(Path(tiny_base.name), tmp_path / "relative")
    pushed(folder)
    assert json.loads(the_hub.files(REPO)["adapter.json"])["base"]["model"] == f"./{tiny_base.name}"
    np.testing.assert_array_equal(
        sample(tmp_path / "there", "--adapter", REPO), sample(tmp_path / "here", "--adapter", folder)
    )
    monkeypatch.chdir(tmp_path)
    result = run("sample", PROMPT, "--adapter", REPO, "--out", tmp_path / "no")
    assert f"./{tiny_base.name}" in str(result.exception)
    assert "--base" in str(result.exception)


def test_a_branch_keeps_what_was_pushed_to_it(the_hub, learned, tiny_base, tmp_path):
    pushed(learned, "--revision", "v1")
    other = write_adapter(tiny_base, tmp_path / "other", ("<new1>", "<new2>"))
    pushed(other)
    assert "<new2>.safetensors" not in the_hub.files(REPO, "v1")
    assert set(adapter.read(hub.resolve(f"{REPO}@v1")).embeddings) == {"<new1>"}
    assert set(adapter.read(hub.resolve(REPO)).embeddings) == {"<new1>", "<new2>"}
    assert f'customdiff.load(pipe, "{REPO}@v1")' in the_hub.files(REPO, "v1")["README.md"].decode()


def test_a_second_push_of_the_same_commits_nothing(the_hub, learned):
    pushed(learned)
    assert "nothing has changed" in pushed(learned)
    assert len(the_hub.repositories[REPO].messages) == 1


def test_what_an_earlier_push_left_goes_and_the_owners_files_stay(the_hub, learned, tiny_base, tmp_path):
    pushed(write_adapter(tiny_base, tmp_path / "two", ("<new1>", "<new2>")), "--with-bin")
    assert {"<new2>.bin", "pytorch_custom_diffusion_weights.bin"} <= set(the_hub.files(REPO))
    the_hub.files(REPO)["notes.md"] = b"mine"
    the_hub.files(REPO)["model.safetensors"] = b"mine too"
    pushed(learned)
    assert set(the_hub.files(REPO)) == FILES | {"notes.md", "model.safetensors"}


def test_a_pickle_that_goes_up_is_made_anew(the_hub, learned):
    (learned / "<new1>.bin").write_bytes(b"somebody's pickle")
    pushed(learned, "--with-bin")
    file = io.BytesIO(the_hub.files(REPO)["<new1>.bin"])
    assert torch.equal(
        torch.load(file, weights_only=True)["<new1>"], adapter.read(learned).embeddings["<new1>"]["text_encoder"]
    )


def test_a_dry_run_writes_what_a_push_sends_and_sends_nothing(the_hub, learned, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "card"
    assert "nothing was sent" in pushed(learned, "--dry-run", out)
    assert the_hub.asked == []
    monkeypatch.setenv("HF_TOKEN", WRITER)
    pushed(learned)
    there = the_hub.files(REPO)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {k: there[k] for k in FILES - {".gitattributes"}}
    assert str(push(learned, "--dry-run", out).exception).startswith("--dry-run: ")


def test_privacy_is_never_taken_for_granted(the_hub, learned):
    the_hub.add(REPO, {}, private=False)
    result = push(learned, "--private")
    assert re.search(rf"^{REPO}: is public", str(result.exception))
    assert the_hub.files(REPO) == {}
    assert "(public)" in pushed(learned)
    assert "(public)" in pushed(learned, "--public", repo="anna/another")


def test_the_licence_is_asked_for_and_never_guessed(the_hub, learned, monkeypatch):
    result = run("push", REPO, "--adapter", learned)
    assert str(result.exception).startswith("--license: ")
    refused = run("push", REPO, "--adapter", learned, "--license", "Apache 2").exception
    assert str(refused).startswith("--license: 'Apache 2'")
    assert the_hub.repositories == {}

    monkeypatch.setattr("customdiff.cli.hub.on_terminal", lambda: True)
    arguments = ["push", REPO, "--adapter", str(learned)]
    assert CliRunner().invoke(cli.commands, arguments, input="cc-by-4.0\n").exit_code == 0
    assert ModelCard(the_hub.files(REPO)["README.md"].decode()).data.license == "cc-by-4.0"


@pytest.mark.parametrize("name", ["grey-cat", "anna/grey-cat@v2", "a/b/c", "anna/", "anna/grey cat", "./anna/cat"])
def test_only_owner_and_name_is_a_place_to_push_to(the_hub, learned, name):
    assert str(push(learned, repo=name).exception).startswith("OWNER/NAME: must be owner/name, a repository")
    if "@" not in name:
        refused = push(learned, "--base-model", name).exception
        assert str(refused).startswith("--base-model: must be owner/name[@revision], a repository")
    assert the_hub.asked == []


def test_a_licence_that_the_hub_does_not_know_is_one_line(the_hub, learned):
    result = run("push", REPO, "--adapter", learned, "--license", "my-own")
    assert isinstance(result.exception, UserError)
    assert re.search(r"must be one of.*--license", str(result.exception))
    assert the_hub.repositories == {}


# nothing private


def test_no_path_token_or_address_of_this_machine_is_published(the_hub, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.org/secret")
    folder = write_adapter(
        tiny_base, tmp_path / "learned", cache="/home/anna/cache/file.bin", drive=r"C:\Users\anna\x.bin"
    )
    output = pushed(folder)
    texts = b"\n".join(the_hub.files(REPO).values()).decode(errors="replace") + output
    for private in (
        str(tiny_base),
        str(tmp_path),
        str(Path.home()) + "/",
        "/home/anna",
        r"C:\\Users",
        WRITER,
        "tracking.",
    ):
        assert private not in texts.replace(the_hub.address, "")
    card = json.loads(the_hub.files(REPO)["adapter.json"])
    assert card["base"]["model"] == f"./{tiny_base.name}"
    assert (card["cache"], card["drive"]) == ("file.bin", "x.bin")
    assert f"others cannot load the base model ./{tiny_base.name}" in output
    assert ModelCard(the_hub.files(REPO)["README.md"].decode()).data.base_model is None


def test_ordinary_words_in_variables_of_mlflow_are_no_secrets(the_hub, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "cat")
    pushed(write_adapter(tiny_base, tmp_path / "learned"))
    assert b"inference: false" in the_hub.files(REPO)["README.md"]


@pytest.mark.parametrize("what", ["home", "here", "token", "tracking"])
def test_what_is_private_is_found_wherever_it_stands(the_hub, tiny_base, tmp_path, monkeypatch, what):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.org/secret")
    secret = {
        "home": f"see {Path.home()}/x",
        "here": f"see {Path.cwd()}",
        "token": f"see {WRITER}",
        "tracking": "see https://tracking.example.org/secret",
    }[what]
    folder = write_adapter(tiny_base, tmp_path / "learned", note=secret)
    result = push(folder)
    assert re.match(r"(adapter\.json|README\.md): would publish ", str(result.exception))
    assert secret.removeprefix("see ") not in str(result.exception)
    assert the_hub.repositories == {}


def test_a_base_model_on_the_hub_may_be_named_in_place_of_a_folder(the_hub, learned):
    output = pushed(learned, "--base-model", "anna/base@v2")
    data = ModelCard(the_hub.files(REPO)["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == ("anna/base", "adapter")
    expected = {"model": "anna/base", "revision": "v2", "variant": None}
    assert json.loads(the_hub.files(REPO)["adapter.json"])["base"] == expected
    assert "others cannot load" not in output


# fetching


def test_only_the_named_safe_files_are_fetched(the_hub, learned, tmp_path):
    pushed(learned, "--with-bin")
    the_hub.files(REPO).update({"evil.safetensors": b"x" * 100, "setup.py": b"x", "images/1.png": b"x"})
    folder = hub.resolve(REPO)
    assert set(the_hub.fetched()) == FILES - {".gitattributes"}
    assert {path.name for path in folder.rglob("*")} == FILES - {".gitattributes"}


def test_a_second_use_fetches_nothing_and_none_at_all_is_needed(the_hub, learned, monkeypatch):
    pushed(learned)
    folder = hub.resolve(REPO)
    the_hub.asked.clear()
    assert hub.resolve(REPO) == folder
    assert the_hub.fetched() == []
    the_hub.close()
    assert hub.resolve(REPO) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(REPO) == folder
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub.resolve("anna/other")


def test_no_token_leaves_the_hub(the_hub, learned):
    """Large files are on another host."""
    pushed(learned)
    hub.resolve(REPO)
    elsewhere = [token for _, path, token in the_hub.asked if path.startswith("/cdn/")]
    assert len(elsewhere) >= 4
    assert set(elsewhere) == {None}
    assert {token for _, path, token in the_hub.asked if path.startswith("/api/models/")} == {WRITER}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("adapter.json", 1_000_001, "adapter.json has 1000001 bytes"), (WEIGHTS, 4_000_000_001, "4000000001 bytes")],
)
def test_too_much_is_refused_before_it_is_fetched(the_hub, learned, name, size, message):
    pushed(learned)

    class Pretended(bytes):
        def __len__(self):
            return size

    the_hub.files(REPO)[name] = Pretended(the_hub.files(REPO)[name])
    with pytest.raises(UserError, match=message):
        hub.resolve(REPO)
    assert name not in the_hub.fetched()


@pytest.mark.parametrize(
    "damage",
    [
        b"not json",
        b"[1]",
        b'{"concepts": {}, "base": {"model": "a/b"}, "fingerprint": []}',
        b'{"concepts": {"cat": {"modifier_token": 1}}, "base": {"model": "a/b"}, "fingerprint": []}',
        b'{"concepts": {"cat": {"modifier_token": "<a>"}}, "base": {"model": "a/b"}, "fingerprint": ["x"]}',
        b'{"concepts": {"cat": {"modifier_token": "<a>"}}, "base": {"modle": "a/b"}, "fingerprint": []}',
        b'{"concepts": {"cat": {"modifier_token": "<a>"}}, "base": {"model": "a/b"}, "fingerprint": [], "method": "x"}',
    ],
)
def test_a_damaged_adapter_json_is_one_line(the_hub, damage):
    the_hub.add(REPO, {"adapter.json": damage})
    with pytest.raises(UserError, match=rf"^{REPO}: adapter\.json is damaged"):
        hub.resolve(REPO)


def test_missing_and_damaged_weights_are_one_line(the_hub, learned):
    pushed(learned)
    good = the_hub.files(REPO)[WEIGHTS]
    the_hub.files(REPO)[WEIGHTS] = good[:100]
    with pytest.raises(UserError, match=rf"^{REPO}: incomplete or damaged adapter"):
        hub.resolve(REPO)
    del the_hub.files(REPO)[WEIGHTS]
    with pytest.raises(UserError, match=rf"^{REPO}: .*{WEIGHTS}"):
        hub.resolve(REPO)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("anna/grey-cat", True),
        ("anna/grey-cat@v2", True),
        ("anna/grey-cat@refs/pr/1", True),
        ("models/adapter", False),
        ("./anna/grey-cat", False),
        ("../grey-cat", False),
        ("/anna/grey-cat", False),
        ("grey-cat", False),
        ("a/b/c", False),
        ("here/now", False),
        (Path("anna/grey-cat"), False),
    ],
)
def test_what_is_a_repository_and_what_a_folder(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    Path("here/now").mkdir(parents=True)
    assert hub.names_repository(source) is expected
    if not expected:
        assert hub.resolve(source) == Path(source)


# what diffusers' own script uploads


def from_diffusers(the_hub, tiny_base, tmp_path, **metadata):
    """A repository with the files of train_custom_diffusion.py, written by diffusers; returns diffusers' pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    processors = {}
    for name in pipe.unet.attn_processors:
        module = pipe.unet.get_submodule(name.removesuffix(".processor"))
        cross = name.endswith("attn2.processor")
        width, text = module.to_k.weight.shape
        processors[name] = CustomDiffusionAttnProcessor2_0(
            train_kv=cross, train_q_out=False, hidden_size=width, cross_attention_dim=text if cross else None
        )
    pipe.unet.set_attn_processor(processors)
    folder = tmp_path / "script"
    pipe.unet.save_attn_procs(folder, safe_serialization=True)
    row = torch.randn(32)
    save_file({"<new1>": row}, folder / "<new1>.safetensors", metadata={"format": "pt"})
    pipe.load_textual_inversion({"<new1>": row})
    front = {"base_model": str(tiny_base), "instance_prompt": PROMPT} | metadata
    lines = [f"{key}: {value}" for key, value in front.items() if value]
    (folder / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n# Custom Diffusion\n")
    the_hub.add(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    return pipe


def test_a_repository_of_diffusers_script_draws_as_diffusers_does(the_hub, tiny_base, tmp_path):
    script = from_diffusers(the_hub, tiny_base, tmp_path)
    pipe = plain(tiny_base)
    before = draw(pipe)
    folder = hub.resolve(REPO)
    adapter.load(pipe, folder)
    np.testing.assert_allclose(draw(pipe), draw(script), atol=1e-5)
    assert np.abs(draw(pipe) - before).max() > 0.01
    config = adapter.read_config(folder)
    assert config.base.model == str(tiny_base)
    assert [concept.instance_prompt for concept in config.concepts.values()] == ["photo of a {} cat"]
    the_hub.asked.clear()
    assert hub.resolve(REPO) == folder


def test_the_base_model_of_a_script_is_asked_for_where_its_card_is_silent(the_hub, tiny_base, tmp_path):
    from_diffusers(the_hub, tiny_base, tmp_path, base_model=None)
    with pytest.raises(UserError, match=rf"^{REPO}: .*--base"):
        hub.resolve(REPO)
    assert sample(tmp_path / "out", "--adapter", REPO, "--base", tiny_base).any()


def test_a_script_on_another_base_is_refused(the_hub, tiny_base, tiny_v_base, tmp_path):
    from_diffusers(the_hub, tiny_base, tmp_path, base_model=tiny_v_base)
    with pytest.raises(UserError, match=rf"^{REPO}: pytorch_custom_diffusion_weights") as caught:
        hub.resolve(REPO)
    assert str(tmp_path) not in str(caught.value)


def test_pickles_alone_are_named_and_never_fetched(the_hub):
    the_hub.add(REPO, {"README.md": b"# cat", "pytorch_custom_diffusion_weights.bin": b"x", "<new1>.bin": b"x"})
    with pytest.raises(UserError, match=r"pickle.*customdiff import FOLDER --format diffusers --allow-pickle"):
        hub.resolve(REPO)
    assert the_hub.fetched() == ["README.md", "README.md"]  # HEAD and GET


def test_a_repository_without_an_adapter_says_so(the_hub):
    the_hub.add(REPO, {"README.md": b"---\nbase_model: [\n---\n", "model_index.json": b"{}"})
    with pytest.raises(UserError, match=rf"^{REPO}: no adapter"):
        hub.resolve(REPO)


# what goes wrong


def failing(path, status, body):
    def prepare(server):
        server.failing = (path, status, {"Content-Type": "text/plain"}, body)

    return prepare


def nothing(server):
    pass


# token, what happens to the server, what is fetched (None: an adapter is pushed), and part of the message
TROUBLES = {
    "forbidden": (READER, nothing, None, "write access"),
    "forbidden in an existing repository": (READER, lambda server: server.add(REPO, {}), None, "write access"),
    "invalid token": ("hf_unknown_marker_0123456789", nothing, None, "hf auth login"),
    "no token": (None, nothing, None, "hf auth login"),
    "no network": (WRITER, Hub.close, None, "HF_ENDPOINT"),
    "no network to fetch": (WRITER, Hub.close, REPO, f"^{REPO}: not a folder here, and on the Hub.*HF_ENDPOINT"),
    "unknown": (WRITER, nothing, "anna/no-such", "^anna/no-such: .*RepositoryNotFoundError"),
    "private": (None, lambda server: server.add(REPO, {}, private=True), REPO, f"^{REPO}: .*hf auth login"),
    "no revision": (WRITER, lambda server: server.add(REPO, {}), f"{REPO}@v9", f"^{REPO}@v9: .*branch, tag or commit"),
    "gated": (WRITER, lambda server: server.add(REPO, {"adapter.json": b"{}"}, gated=True), REPO, "accept its terms"),
    "no name": (WRITER, nothing, "anna/a--b", "^anna/a--b: .*owner/name"),
    # the client does not retry status 422
    "quoted token": (
        WRITER,
        failing("/commit/", 422, "no disk; {token} sent, hf_marker_of_another_1"),
        None,
        r"no disk; \*\*\* sent, \*\*\*; .*422",
    ),
    "storage": (WRITER, failing("/cdn/", 403, "{token}"), None, "write access"),
}


@pytest.mark.parametrize(("token", "prepare", "fetched", "message"), TROUBLES.values(), ids=TROUBLES)
def test_trouble_is_one_line_without_a_token(the_hub, learned, monkeypatch, tmp_path, token, prepare, fetched, message):
    monkeypatch.setenv("HF_TOKEN", token or "")
    prepare(the_hub)
    result = run("sample", PROMPT, "--adapter", fetched) if fetched else push(learned)
    assert isinstance(result.exception, UserError), result.exception
    line = str(result.exception)
    assert re.search(message, line), line
    assert "\n" not in line
    assert str(tmp_path) not in line
    told = line + result.output + "".join(traceback.format_exception(result.exception))
    assert "marker" not in told
    assert not list(tmp_path.glob("work/*"))


def test_a_cache_that_cannot_be_written_is_one_line(the_hub, learned, monkeypatch, tmp_path):
    the_hub.add(REPO, {"adapter.json": b"{}"})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(UserError, match=f"^{REPO}: .*cache"):
        hub.resolve(REPO)


@pytest.mark.parametrize("bug", [KeyError("a bug"), TypeError("a bug"), AssertionError("a bug")])
def test_a_bug_keeps_its_traceback(the_hub, learned, monkeypatch, bug):
    def fail(*_, **__):
        raise bug

    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert push(learned).exception is bug
    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(type(bug)):
        hub.resolve(REPO)


def test_the_password_of_an_address_is_not_shown(the_hub, monkeypatch):
    the_hub.failing = ("/api/", 418, {}, "")
    monkeypatch.setattr(constants, "ENDPOINT", the_hub.address.replace("//", "//anna:hidden@"))
    with pytest.raises(UserError, match=the_hub.address) as caught:
        hub.resolve(REPO)
    assert "hidden" not in str(caught.value)


def test_the_environment_and_a_login_are_honoured(learned, tiny_base, tmp_path, monkeypatch):
    """In its own process, because huggingface_hub reads the environment when it is imported."""
    monkeypatch.chdir(tmp_path)  # `sample` takes its settings from a params.yaml in the working directory
    server = Hub()
    home = tmp_path / "home"
    home.mkdir()
    program = f"""
import os, sys
from pathlib import Path
from customdiff.cli import commands
from customdiff.errors import UserError

push = ["push", "{REPO}", "--adapter", r"{learned}", "--license", "apache-2.0"]
try:
    commands(push, standalone_mode=False)
except UserError as error:
    print(error)
del os.environ["HF_TOKEN"]
Path(os.environ["HF_HOME"], "token").write_text("{WRITER}")  # what `hf auth login` leaves
commands(push, standalone_mode=False)
commands(["sample", "{PROMPT}", "--adapter", "{REPO}", "--base", r"{tiny_base}", "--steps", "1", "--device", "cpu"])
"""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    given = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_TOKEN": READER, "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=inherited | given | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    server.close()
    assert result.returncode == 0, result.stderr
    refusal, done, _ = result.stdout.splitlines()
    assert refusal.startswith(f"{REPO}: ")
    assert "write access" in refusal
    assert done.startswith(f"{server.address}/{REPO} (private): commit")
    assert not re.search("Warning|Traceback|Fetching|Upload", result.stderr), result.stderr
    assert "marker" not in result.stdout + result.stderr
    assert (home / "hub").is_dir()
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "samples" / "grid.png")),
        sample(tmp_path / "here", "--adapter", learned, "--steps", 1),
    )


# the code in the model card


def code(page, words):
    """The Python code after a line of the card."""
    return page.split(words)[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("which", "method"),
    [
        ("tiny_base", "custom_diffusion"),
        ("tiny_v_base", "custom_diffusion"),
        ("tiny_xl_base", "custom_diffusion"),
        ("tiny_base", "textual_inversion"),
        ("tiny_base", "lora"),
        ("tiny_xl_base", "lora"),
    ],
)
def test_diffusers_draws_the_same_with_the_code_of_the_card(the_hub, tmp_path, request, which, method, monkeypatch):
    base_folder = request.getfixturevalue(which)
    folder = write_adapter(base_folder, tmp_path / "learned", ("<new1>", "<new2>"), method=method)
    pushed(folder, "--revision", "v1")
    page = the_hub.files(REPO, "v1")["README.md"].decode()
    ours = plain(base_folder)
    adapter.load(ours, folder)
    prompt = "a <new1> cat on <new2>"
    expected = draw(ours, prompt)
    monkeypatch.chdir(base_folder.parent)
    names = {}
    block = code(page, "With diffusers alone:")
    exec(block.rpartition("image = ")[0], names)
    names["pipe"].set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(names["pipe"], prompt), expected, atol=1e-4)
    assert np.abs(expected - draw(plain(base_folder), prompt)).max() > 0.01
    assert f'image = pipe("{PROMPT}").images[0]' in block


def test_load_takes_a_repository(the_hub, learned, tiny_base):
    pushed(learned)
    pipe, other = plain(tiny_base), plain(tiny_base)
    customdiff.load(pipe, REPO)
    customdiff.load(other, learned)
    np.testing.assert_array_equal(draw(pipe), draw(other))
