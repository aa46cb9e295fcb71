"""Run clip-retrieval's command line, which lives in an environment of its own.

It is not imported, because its requirements hold numpy and transformers at old versions.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from customdiff.errors import UserError
from customdiff.interrupts import end_with_parent

NAME = "clip-retrieval"
ENVIRONMENT = ".venv-clip-retrieval"
VARIABLE = "CUSTOMDIFF_CLIP_RETRIEVAL"
OPENAI_NAMES = {  # names that clip-retrieval knows, and the Hub repositories of the same models
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


def command(root: Path | str = ".") -> list[str]:
    """The command that runs clip-retrieval.

    Looked up in the environment variable CUSTOMDIFF_CLIP_RETRIEVAL, then in `.venv-clip-retrieval` of the project,
    then on the PATH.

    Args:
        root: the project's folder.

    Raises:
        UserError: it is not installed; gives the commands that install it.
    """
    if named := os.environ.get(VARIABLE):
        found = [named] if Path(named).is_file() else shlex.split(named)
        if not shutil.which(found[0]):
            raise UserError(f"{VARIABLE}: {named} cannot be run; set it to clip-retrieval's executable, or unset it")
        return [str(Path(found[0]).resolve()) if Path(found[0]).is_file() else found[0], *found[1:]]
    for project in (Path(root), Path(__file__).parents[2]):
        for path in ("bin/clip-retrieval", "Scripts/clip-retrieval.exe"):
            if (project / ENVIRONMENT / path).is_file():
                return [str((project / ENVIRONMENT / path).absolute())]
    if on_path := shutil.which(NAME):
        return [on_path]
    raise UserError(
        f"retrieve.backend: index needs {NAME}, which is not installed; run: uv venv {ENVIRONMENT} && "
        f"uv pip install --python {ENVIRONMENT} -r requirements/clip-retrieval.txt"
    )


def run(command: list[str], arguments: list[str], folder: Path) -> None:
    """Run clip-retrieval in a folder; its output is shown only if it fails.

    Args:
        command: from `command()`.
        arguments: subcommand and options.

    Raises:
        UserError: it cannot be run, or failed.
    """
    env = os.environ | {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    # Its imports take 30 s without compiled files, and 12 s with them.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    for ours in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # so that it does not import our packages
        env.pop(ours, None)
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Also if this process is killed.
            preexec_fn=(lambda: end_with_parent(signal.SIGKILL)) if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror or error})") from error
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        print("\n".join(lines[-20:]), file=sys.stderr)
        raise UserError(
            f"`{NAME} {arguments[0]}` failed (exit status {done.returncode}): "
            f"{lines[-1][:200] if lines else 'no output'}"
        )


def model_argument(clip: str, folder: Path) -> str:
    """The value of `--clip_model` for a CLIP.

    clip-retrieval warms up every model with texts of 77 tokens from OpenAI's vocabulary of 49408. A CLIP with a smaller
    text model would fail there, although only images are embedded. It is replaced by a copy with the same image
    encoder and a text encoder without layers.

    Args:
        clip: a CLIP folder, a Hub repository, or one of OpenAI's names such as ViT-B/32.
        folder: where to write the copy if one is needed.

    Raises:
        UserError: a folder without a CLIP.
    """
    clip = OPENAI_NAMES.get(clip, clip)
    path = Path(clip)
    if not path.is_dir():
        return f"hf_clip:{clip}"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        text = config["text_config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"retrieve.index.clip: {clip} is not a CLIP (no config.json with text_config)") from error
    if text.get("vocab_size", 49408) >= 49408 and text.get("max_position_embeddings", 77) >= 77:
        return f"hf_clip:{path.resolve()}"
    _write_image_encoder(path, config, folder)
    return f"hf_clip:{folder.name}"


def _write_image_encoder(path: Path, config: dict[str, Any], folder: Path) -> None:
    """Write a copy of a CLIP whose text encoder has no layers."""
    from safetensors.numpy import load_file, save_file

    width, tokens, positions = 8, 49408, 77
    files = sorted(path.glob("model*.safetensors"))  # several if the weights are sharded
    weights = {k: v for file in files for k, v in load_file(file).items() if not k.startswith("text_")}
    weights |= {
        "text_model.embeddings.token_embedding.weight": np.zeros((tokens, width), np.float32),
        "text_model.embeddings.position_embedding.weight": np.zeros((positions, width), np.float32),
        "text_model.final_layer_norm.weight": np.ones(width, np.float32),
        "text_model.final_layer_norm.bias": np.zeros(width, np.float32),
        "text_projection.weight": np.zeros((config["projection_dim"], width), np.float32),
    }
    text = {"vocab_size": tokens, "max_position_embeddings": positions, "hidden_size": width}
    text |= {"intermediate_size": width, "num_hidden_layers": 0, "num_attention_heads": 1}
    processor = path / "preprocessor_config.json"
    pixels = json.loads(processor.read_text()) if processor.is_file() else _nested_processor(path)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(pixels | {"image_processor_type": "CLIPImageProcessor"})
    )
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _nested_processor(path: Path) -> dict[str, Any]:
    """The image processor's settings in a CLIPProcessor that transformers 5 saved as a whole."""
    try:
        return json.loads((path / "processor_config.json").read_text())["image_processor"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"retrieve.index.clip: {path} has no preprocessor_config.json") from error
