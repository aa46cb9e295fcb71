"""Steps of adding a concept: check the photos, propose their class, find masks and captions, and keep all of it.

Steps import torch when they run, so that mistakes are reported at once.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from customdiff import config
from customdiff.config import Concept, Params
from customdiff.errors import UserError
from customdiff.files import atomic_directory, atomic_file
from customdiff.new_concept import entry, photos
from customdiff.sources.instance_images import Collected, errors_name_the_source, read_instance_images

if TYPE_CHECKING:
    from customdiff.new_concept.class_words import Guess
    from customdiff.preparation.examples import Example

CONCEPTS = Path("data/concepts")


class Photos(NamedTuple):
    """Photos that were read and checked, in temporary folders until everything else is known to be right.

    Attributes:
        path: for params.yaml.
        copy: to become data/concepts/<name>; None if the photos are not copied.
        instances: folder with the photos as download-data stores them.
        checked: what was kept and what was set aside.
    """

    path: str
    copy: Path | None
    instances: Path
    checked: Collected


def check_is_new(name: str, params: Params, *, copy: bool, replace: bool) -> None:
    """Refuse a name that is not one, or that a concept or a folder of photos has already.

    Raises:
        UserError: names the mend.
    """
    entry.check_name(name)
    if replace:
        return
    if name in params.concepts:
        raise UserError(f"NAME: params.yaml has a concept {name} already; choose another name, or give --replace")
    if copy and (CONCEPTS / name).exists():
        raise UserError(
            f"NAME: {CONCEPTS / name} exists already; choose another name, give --replace to replace its photos, or "
            f"use them with `customdiff new {name} {CONCEPTS / name} --no-copy`"
        )


def gather(name: str, sources: Sequence[Path], params: Params, work: Path, *, copy: bool) -> Photos:
    """Copy the photos into the empty folder `work`, and read them as download-data does.

    Raises:
        UserError: a path is wrong, or there are too few or too many good photos.
    """
    sources = [source.expanduser() for source in sources]
    inside = [source for source in sources if source.resolve().is_relative_to((CONCEPTS / name).resolve())]
    if copy and inside:
        raise UserError(f"PHOTOS: {inside[0]} is in {CONCEPTS / name} already; give the folder and --no-copy")
    if copy:
        copied, target = work / "copy", (CONCEPTS / name).as_posix()
        photos.gather(sources, copied, work / "unpacked", params.download)
    else:
        if len(sources) != 1 or (sources[0].is_file() and photos.is_photo(sources[0])):
            raise UserError("PHOTOS: --no-copy needs one folder or one archive, which params.yaml will name")
        copied, target = None, sources[0].as_posix()
    instances = work / name
    checked = photos.check(name, config.Source(path=str(copied or target)), params.download, instances)
    if copied:
        photos.remove_set_aside(copied, checked)
    return Photos(target, copied, instances, checked)


def guesses(gathered: Photos, params: Params) -> "tuple[str, list[Guess]]":
    """The name of the CLIP model that proposes the class, and its proposals, the most probable first.

    Raises:
        UserError: the model cannot be loaded.
    """
    from customdiff.models import base
    from customdiff.models.clip import Clip
    from customdiff.new_concept.class_words import COMMON_WORDS, clip_of, pool_words, propose

    name, key = clip_of(params)
    clip = Clip.load(name, base.device(params.base.device), key=f"--class is not given, and {key}")
    return name, propose(clip, read_instance_images(gathered.instances), pool_words(params) or COMMON_WORDS)


def token_for(name: str, params: Params, *, only: bool) -> str:
    """The token of the entry that is replaced, or the first free one."""
    if name in params.concepts:
        return params.concepts[name].modifier_token
    return entry.free_token({} if only else params.concepts)


def examples(gathered: Photos, concept: Concept, params: Params) -> "list[Example]":
    """The photos with masks and captions, as the stage prepare will make them.

    Raises:
        UserError: a caption is wrong, or the captioner or segmenter cannot be loaded.
    """
    from transformers.utils.logging import disable_progress_bar

    from customdiff.models import base
    from customdiff.preparation.examples import instance_examples

    disable_progress_bar()
    try:
        with errors_name_the_source(gathered.instances):
            return instance_examples(
                gathered.instances,
                concept,
                params.prepare,
                base.device(params.base.device),
                tokenizer=base.load_tokenizer(params.base),
            )
    except UserError as error:
        raise UserError(f"{error}; --no-sheet adds the concept without this check") from error


def keep(name: str, gathered: Photos, found: "Sequence[Example]") -> Path | None:
    """Move the copied photos to data/concepts/<name>, and write their contact sheet beside it; returns its path.

    Args:
        found: the photos with masks and captions; none: no sheet.
    """
    if gathered.copy:
        with atomic_directory(CONCEPTS / name) as incoming:
            shutil.copytree(gathered.copy, incoming, dirs_exist_ok=True)
    sheet = CONCEPTS / f"{name}-sheet.jpg"
    sheet.unlink(missing_ok=True)  # of photos that were replaced
    if not found:
        return None
    from customdiff.images import save_sheet
    from customdiff.preparation.sheet import contact_sheet

    with atomic_file(sheet) as incoming:
        save_sheet(contact_sheet(found), incoming)
    return sheet
