"""Tab Concepts: add a concept from photos; see and mend captions and masks; set photos aside."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from nicegui import events, ui
from PIL import Image

from customdiff import config
from customdiff.app.common import Session, busy, confirm, guarded, heading, picture
from customdiff.app.dropped import MAX_PHOTO_MEGABYTES, DroppedPhotos
from customdiff.app.paint import paint
from customdiff.errors import UserError
from customdiff.images import SUFFIXES, open_rgb
from customdiff.new_concept import adding, entry, photo_files
from customdiff.new_concept.photo_files import ShownPhoto
from customdiff.preparation.masks import SubjectMask
from customdiff.preparation.sheet import outlined


def build(session: Session) -> Callable[[], None]:
    """Both parts of the tab, which stay as they are while other tabs are open."""
    with ui.card().classes("w-full"):
        heading("Add a concept")
        NewConcept(session)
    with ui.card().classes("w-full"):
        heading("Photos, captions and masks")
        ConceptPhotos(session)
    return lambda: None


class NewConcept:
    """The form that adds a concept, as `customdiff new` does."""

    def __init__(self, session: Session) -> None:
        self.session, self.dropped = session, DroppedPhotos()
        self.tiles: set[str] = set()  # the photos that are shown
        ui.context.client.on_delete(self.dropped.clean_up)
        limits = session.file.params.download
        self.upload = ui.upload(
            label="Drop 4 to 5 photos of one subject here, or press +",
            multiple=True,
            auto_upload=True,
            max_file_size=MAX_PHOTO_MEGABYTES * 1_000_000,
            max_files=limits.maximum,
            on_upload=self.take,
            on_rejected=lambda: self.refuse(limits.maximum),
        ).classes("w-full")
        self.upload.props(f'accept="{",".join([*SUFFIXES, ".txt"])}" flat bordered').props["aria-label"] = "Photos"
        self.upload.on("finish", self.upload.reset)  # the thumbnails show them
        self.thumbnails = ui.row().classes("w-full gap-2")
        with ui.row().classes("w-full items-center gap-4"):
            self.name = (
                ui.input("Name", placeholder="rex").classes("w-64").props('hint="lower-case letters, digits, _ and -"')
            )
            self.words = ui.input("Class", placeholder="dog").props('hint="what the subject is"')
            self.guesses = ui.row().classes("gap-1")
            busy(ui.button("Propose the class").props("flat"), self.propose_class)
        with ui.row().classes("w-full items-center gap-4"):
            self.only = ui.switch("Learn it alone (--only)")
            self.replace = ui.switch("Replace a concept of this name (--replace)")
        busy(ui.button("Show captions, masks and the change", icon="visibility"), self.add)

    async def take(self, event: events.UploadEventArguments) -> None:
        """Check a dropped file, and show it."""
        with guarded():
            data = await event.file.read()
            limits = self.session.file.params.download
            name = await asyncio.to_thread(self.dropped.add, event.file.name, data, limits)
            if name in self.dropped.names and name not in self.tiles:  # neither a caption nor dropped before
                self.tiles.add(name)
                self.show(name)

    def refuse(self, maximum: int) -> None:
        """Say why the browser did not send a file."""
        ui.notify(
            f"Some files were left out: at most {maximum} photos (download.maximum), of at most {MAX_PHOTO_MEGABYTES} "
            "MB each, and only photos and captions (.txt)",
            type="negative",
            multi_line=True,
            timeout=0,
            close_button="Close",
        )

    def show(self, name: str) -> None:
        """The thumbnail of a photo that was dropped, with a button that leaves it out."""

        def leave_out() -> None:
            self.dropped.remove(name)
            self.tiles.discard(name)
            tile.delete()

        with self.thumbnails, ui.column().classes("w-24 gap-0 items-center") as tile:
            picture(self.dropped.thumbnail(name), name, "w-24")
            ui.label(name).classes("text-xs break-all")
            ui.button("Leave out", on_click=leave_out).props("flat dense size=sm")

    async def propose_class(self) -> None:
        """Ask CLIP for the class, and offer its three most probable words."""
        params = self.session.file.params
        gathered = await asyncio.to_thread(self.gather, "new", params)
        _, guesses = await asyncio.to_thread(adding.guesses, gathered, params)
        self.words.set_value(self.words.value or guesses[0].word)
        self.guesses.clear()
        with self.guesses:
            for guess in guesses[:3]:
                text = f"{guess.word} ({guess.probability:.0%})"
                ui.chip(text, on_click=lambda guess=guess: self.words.set_value(guess.word)).props("clickable outline")

    def gather(self, name: str, params: config.Params) -> adding.Photos:
        """Check the photos together, as the stage download-data will."""
        if not self.dropped.names:
            raise UserError("no photos yet; drop 4 to 5 photos of the subject")
        return adding.gather(name, [self.dropped.folder], params, self.dropped.work(), copy=True)

    async def add(self) -> None:
        """Show what would be written, and write it if the user agrees."""
        name, params, only = self.name.value.strip(), self.session.file.params, self.only.value
        adding.check_is_new(name, params, copy=True, replace=self.replace.value)
        gathered = await asyncio.to_thread(self.gather, name, params)
        if not self.words.value.strip():
            await self.propose_class()
        token = adding.token_for(name, params, only=only)
        values = entry.new_entry(gathered.path, token, " ".join(self.words.value.split()))
        edited = entry.with_concept(self.session.file.text, name, values, only=only)
        changed = config.parse(edited)
        examples = await asyncio.to_thread(adding.examples, gathered, changed.concepts[name], changed)

        def show() -> None:
            with ui.scroll_area().classes("w-full h-60"):
                for example in examples:
                    with ui.row().classes("w-full items-center no-wrap"):
                        picture(_outlined(open_rgb(example.path), example.mask), example.caption, "w-20 shrink-0")
                        with ui.column().classes("gap-0"):
                            ui.label(example.caption)
                            ui.label("; ".join(example.notes)).classes("text-xs opacity-70")

        if await self.session.propose(edited, lambda: adding.keep(name, gathered, examples), show):
            self.dropped.clear()
            self.tiles.clear()
            self.thumbnails.clear()


class ConceptPhotos:
    """The photos of one concept of params.yaml, with what the stage prepare will make of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        names = list(session.file.params.concepts)
        self.concept = ui.select(names, value=names[-1], label="Concept", on_change=self.load).classes("w-48")
        self.rows = ui.column().classes("w-full")
        session.on_change.append(self.reload)
        ui.timer(0.1, self.load, once=True)

    def reload(self) -> None:
        """Offer the concepts of params.yaml as it is now, the last one first."""
        names = list(self.session.file.params.concepts)
        if names != self.concept.options:
            self.concept.set_options(names, value=names[-1])
        else:
            ui.timer(0, self.load, once=True)

    async def load(self) -> None:
        """Read photos, captions and masks, and show them."""
        name, params = self.concept.value, self.session.file.params
        self.rows.clear()
        with self.rows, ui.row().classes("items-center"):
            ui.spinner()
            ui.label("Reading photos, captions and masks ...")
        folder, found = None, list[ShownPhoto]()
        with self.rows, guarded():  # the button that was pressed may be gone
            folder = _inside(photo_files.source_folder(name, params.concepts[name]))
            found = await asyncio.to_thread(photo_files.shown_photos, params, name)
        if name == self.concept.value:  # no other one was chosen meanwhile
            self.show(folder, found, params.concepts[name])

    def show(self, folder: Path | None, found: list[ShownPhoto], concept: config.Concept) -> None:
        """One row per photo, and those that were set aside, which can be brought back where too few are left."""
        self.rows.clear()
        if folder is None:
            return
        with self.rows:
            for each in found:
                self.row(folder, each, concept)
            for path in photo_files.photos_aside(folder):
                with ui.row().classes("items-center"):
                    ui.label(f"{path.name} is set aside").classes("opacity-70")
                    back = ui.button("Bring back", on_click=lambda path=path: self.change(photo_files.bring_back, path))
                    back.props("flat dense")

    def row(self, folder: Path, shown: ShownPhoto, concept: config.Concept) -> None:
        """A photo with the outline of its mask, its caption, and buttons."""
        photo, example = folder / shown.name, shown.example
        with ui.row().classes("w-full items-center gap-4 no-wrap max-sm:flex-wrap"):
            image = _outlined(shown.image, example.mask)
            picture(image, f"{shown.name} with the outline of its mask", "w-32 shrink-0")
            with ui.column().classes("grow gap-1 min-w-0"):
                text = example.caption.replace(concept.modifier_token, "{}")
                caption = ui.input(f"Caption of {shown.name}; {{}} is the subject", value=text).classes("w-full")
                ui.label("; ".join(example.notes)).classes("text-xs opacity-70")
                with ui.row().classes("gap-1"):
                    save = ui.button("Save the caption").props("flat dense")
                    busy(save, lambda: self.save_caption(photo, text, caption.value, concept))
                    busy(ui.button("Paint the mask").props("flat dense"), lambda: self.paint(photo, shown))
                    aside = ui.button("Set aside", on_click=lambda: self.change(photo_files.set_aside, photo))
                    aside.props("flat dense")

    async def save_caption(self, photo: Path, old: str, new: str, concept: config.Concept) -> None:
        """Write a caption beside its photo, after showing the difference."""
        if await confirm(f"Write {photo.with_suffix('.txt')}?", f"-{old}\n+{new}"):
            photo_files.write_caption(photo, new, concept)
            await self.load()

    async def paint(self, photo: Path, shown: ShownPhoto) -> None:
        """Paint on a mask, and write it beside the photo."""
        mask = await paint(shown.image, shown.example.mask)
        if mask:
            ui.notify(f"{photo_files.write_mask(photo, mask)} is written", type="positive")
            await self.load()

    async def change(self, move: Callable[[Path], Path], photo: Path) -> None:
        """Set a photo aside, or bring it back."""
        with guarded():
            move(photo)
        await self.load()


def _inside(folder: Path) -> Path:
    if not folder.resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{folder}: lies outside the project, whose files alone this page shows; add the photos again")
    return folder


def _outlined(photo: Image.Image, mask: SubjectMask | None) -> Image.Image:
    return outlined(photo, mask.coverage) if mask else photo
