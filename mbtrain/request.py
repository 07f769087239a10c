"""What a user wants to have sampled, and what follows from that for a run: prompt, number of bytes, rows.

Asked (options of the verb, or the configuration's section)  ->  Plan (form, prompt, bytes, rows)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from mbtrain import render
from mbtrain.config import Config, SampleConfig
from mbtrain.errors import ConfigError
from mbtrain.render import Form

TEXT_BYTES = 256  # made unless told otherwise
AUDIO_S = 2.0
PICTURES = 4


@dataclass(frozen=True)
class Asked:
    """What a user wants to have sampled. What is None or empty follows from the source's modality, see `plan`.

    prompt        bytes of a text that is continued
    prompt_file   or a file, of any kind that data prep reads, and of its canonical bytes the first prompt_bytes: a
                  number, or a share as in 50%
    n_bytes       most bytes of each continuation
    count         continuations
    source        name of the source as which the file is read and the bytes are shown
    shape         of images of native size: HxW in pixels
    option        how the options are written in an error: --name or sample.name
    """

    prompt: bytes = b""
    prompt_file: str = ""
    prompt_bytes: str = ""
    n_bytes: int | None = None
    count: int | None = None
    source: str = ""
    shape: str = ""
    option: str = "--"

    def name(self, option: str) -> str:
        """An option as its user writes it."""
        return self.option + (option.replace("_", "-") if self.option == "--" else option)


@dataclass(frozen=True)
class Plan:
    """What will be made: `count` continuations of a prompt, each of at most n_bytes, and how they are shown.

    prompt and original (the whole image that the prompt was cut from, if so) are in the model's order. `documents`:
    rows stand after a boundary, `ends`: and may end with one. assumed: nothing says the image's shape.
    """

    form: Form
    prompt: bytes
    n_bytes: int
    count: int
    original: bytes | None = None
    documents: bool = True
    ends: bool = True
    assumed: bool = False

    @property
    def missing_bytes(self) -> int:
        """Of an image, so many bytes are neither given nor made; they are shown grey."""
        return self.form.picture_bytes - len(self.prompt) - self.n_bytes if self.form.modality == "image" else 0


def asked_in(section: SampleConfig) -> Asked:
    """What the configuration asks for."""
    return Asked(
        prompt=section.prompt.encode(),
        prompt_file=section.prompt_file or "",
        prompt_bytes=section.prompt_bytes or "",
        n_bytes=section.bytes,
        count=section.count,
        source=section.source or "",
        option="sample.",
    )


def chosen(run: Path, settings: Config, asked: Asked) -> list[Form]:
    """The source that was asked for, else the first one of each modality of the run. Raises ConfigError."""
    forms = render.forms(run, settings)
    if asked.source:
        named = [form for form in forms if form.source == asked.source]
        if not named:
            known = ", ".join(form.source for form in forms)
            raise ConfigError(f"{asked.name('source')}: got {asked.source!r}, expected one of {known}")
        return named
    firsts: dict[str, Form] = {}
    for form in forms:
        firsts.setdefault(form.modality, form)
    if asked.prompt_file and len(firsts) > 1:
        given = f"{asked.name('prompt_file')}={asked.prompt_file}"
        raise ConfigError(f"{given}: the run has {', '.join(firsts)}; say with {asked.name('source')} which one it is")
    return list(firsts.values())


def plans(run: Path, settings: Config, asked: Asked) -> list[Plan]:
    """A plan for each source chosen; a prompt that is text goes to text alone. Raises ConfigError."""
    forms = chosen(run, settings, asked)
    silent = replace(asked, prompt=b"") if any(form.modality == "text" for form in forms) else asked
    return [plan(form, settings, asked if form.modality == "text" else silent) for form in forms]


def plan(form: Form, settings: Config, asked: Asked) -> Plan:
    """Find prompt, bytes and rows for samples of a source.

    Without other wishes, text: 256 bytes after all of the prompt; an image: the rest of one picture after half of
    the file; audio: 2 seconds after the file's first second. Raises ConfigError.
    """
    form, assumed = _with_shape(form, settings, asked)
    if asked.prompt and form.modality != "text":
        raise ConfigError(f"{asked.name('prompt')}: {form.source} is {form.modality}; give {asked.name('prompt_file')}")
    if asked.prompt_bytes and not asked.prompt_file:
        raise ConfigError(
            f"{asked.name('prompt_bytes')}: is a part of a file; give {asked.name('prompt_file')} as well"
        )
    prompt, original = asked.prompt, None
    if asked.prompt_file:
        content = read_prompt(asked)
        try:
            form, whole = render.canonical(replace(form, shape=None) if assumed else form, content)
        except ConfigError as error:
            raise ConfigError(f"{asked.name('prompt_file')}={asked.prompt_file}: {error}") from error
        assumed = False
        default = {"text": len(whole), "image": len(whole) // 2, "audio": min(len(whole), form.second_bytes)}
        n = _part(asked, len(whole)) if asked.prompt_bytes else default[form.modality]
        prompt = whole[: n - n % form.unit]
        original = whole if form.modality == "image" else None
    n_bytes = asked.n_bytes
    if form.modality == "image":
        render.row_order(form)  # a shape that cannot be read is said before anything is made
        left = form.picture_bytes - len(prompt)
        if left == 0:
            raise ConfigError(f"{asked.name('prompt_bytes')}: nothing is left of the picture; give fewer")
        n_bytes = n_bytes or left
        if n_bytes > left:
            raise ConfigError(f"{asked.name('bytes')}: got {n_bytes}, expected at most {left}, the rest of a picture")
    packed = settings.data.rows in ("auto", "packed")
    return Plan(
        form,
        prompt,
        n_bytes or (TEXT_BYTES if form.modality == "text" else round(AUDIO_S * form.second_bytes)),
        asked.count or (PICTURES if form.modality == "image" else 1),
        original,
        documents=form.modality == "text" and packed,
        ends=form.modality == "text",
        assumed=assumed,
    )


def _with_shape(form: Form, settings: Config, asked: Asked) -> tuple[Form, bool]:
    """The form with a shape, and whether that is an assumption."""
    if not asked.shape:
        if form.modality != "image" or form.shape is not None:
            return form, False
        return render.square(form, settings.data.seq_len), True
    sides = [int(side) if side.isdecimal() else 0 for side in asked.shape.split("x")]
    if form.modality != "image" or len(sides) != 2 or not all(sides):
        what = (
            "HxW in pixels, as in 48x64" if form.modality == "image" else f"nothing: {form.source} is {form.modality}"
        )
        raise ConfigError(f"{asked.name('shape')}: got {asked.shape!r}, expected {what}")
    if form.shape not in (None, (sides[0], sides[1])):
        raise ConfigError(f"{asked.name('shape')}: got {asked.shape}, expected {render.hxw(form)} as {form.source} has")
    return replace(form, shape=(sides[0], sides[1])), False


def _part(asked: Asked, whole: int) -> int:
    """prompt_bytes of a file of so many canonical bytes."""
    text = asked.prompt_bytes
    try:
        n = whole * Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(int(text))
    except (ValueError, ZeroDivisionError):
        n = Fraction(-1)
    if not 0 <= n <= whole:
        allowed = f"at most the file's {whole} bytes, or a share as in 50%"
        raise ConfigError(f"{asked.name('prompt_bytes')}: got {text!r}, expected {allowed}")
    return int(n)


def read_prompt(asked: Asked) -> bytes:
    """The content of the prompt file, b"" without one. Raises ConfigError where it cannot be read."""
    try:
        return Path(asked.prompt_file).read_bytes() if asked.prompt_file else b""
    except OSError as error:
        given = f"{asked.name('prompt_file')}={asked.prompt_file}"
        raise ConfigError(f"{given}: cannot be read ({error.strerror})") from error
