"""Images without a download: digits drawn with the fonts of matplotlib, different for each client number.

    samples = load_glyphs("glyphs:3")              # client 3: 200 images of its classes, in its style
    samples = glyph_images(1000, style_of(3), seed=1, classes=(4, 5))

Clients differ in classes (`CLASSES_PER_CLIENT` of the ten digits) and in style: each has its own four fonts, colours,
tilt, slant, size and disturbances (neighbouring digits, scratches, noise). A model of its own therefore helps a client,
and so do strokes that other clients have seen. The images are for demonstrations and tests, not for evidence.

They depend on the seeds alone: the same versions of matplotlib, pillow and numpy give the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgefed.errors import DataError
from edgefed.personal.samples import ImageSamples

PREFIX = "glyphs:"
CLASSES = tuple("0123456789")
CLASSES_PER_CLIENT = 5
IMAGES_PER_CLIENT = 200
MAX_CLIENTS = 1000
"""Upper limit of client numbers."""
SIDE = 32
_CANVAS = 96
"""Side of the square on which a digit is drawn before it is rotated and scaled."""
_POINTS = 64
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GlyphStyle:
    """How a client's digits look.

    Attributes:
        fonts: names out of `FONTS`.
        ink: RGB, 0..255; each image differs by up to `COLOUR_SPREAD`.
        paper: as ``ink``.
        tilt: rotation in degrees; each image differs by up to `TILT_SPREAD`.
        slant: shear, columns per row.
        height: of a digit, in pixels of the image.
        neighbours: share of images with parts of neighbouring digits.
        scratches: lines per image.
        noise: maximum deviation of a pixel, 0..255.
    """

    fonts: tuple[str, ...]
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    tilt: float
    slant: float
    height: float
    neighbours: float
    scratches: int
    noise: int


COLOUR_SPREAD = 30
TILT_SPREAD = 15.0
SLANT_SPREAD = 0.15
HEIGHT_SPREAD = 0.25
SHIFT_PIXELS = 3.5
MIN_CONTRAST = 150
"""Minimum difference in brightness between ink and paper of a style."""


def is_glyphs(name: str) -> bool:
    """Whether ``name`` refers to these images instead of a file."""
    return name.startswith(PREFIX)


def load_glyphs(name: str) -> ImageSamples:
    """The images of ``glyphs:NUMBER``. Raises DataError unless the number is 0 to 999."""
    number = name.removeprefix(PREFIX)
    if not (number.isascii() and number.isdigit() and len(number) <= 4 and int(number) < MAX_CLIENTS):
        raise DataError(
            f"invalid client number {number!r:.40} of the embedded images",
            remedy=f"Use {PREFIX}0 to {PREFIX}{MAX_CLIENTS - 1}.",
        )
    return glyph_client(int(number))


def glyph_client(index: int, num_images: int = IMAGES_PER_CLIENT, seed: int = 0) -> ImageSamples:
    """Images of client ``index``: its classes in its style. Another ``seed`` gives other images of the same client."""
    return glyph_images(num_images, style_of(index), seed=seed * MAX_CLIENTS + index, classes=classes_of(index))


def classes_of(index: int) -> tuple[int, ...]:
    """The five digits of client ``index``. Clients 0 and 1, 2 and 3, ... have no digit in common."""
    order = np.random.default_rng([7, index // 2]).permutation(len(CLASSES))
    start = index % 2 * CLASSES_PER_CLIENT
    return tuple(sorted(int(label) for label in order[start : start + CLASSES_PER_CLIENT]))


def style_of(index: int) -> GlyphStyle:
    """The style of client ``index``."""
    rng = np.random.default_rng([11, index])
    while True:
        ink, paper = rng.integers(0, 256, (2, 3))
        if abs(_brightness(ink) - _brightness(paper)) >= MIN_CONTRAST:
            break
    return GlyphStyle(
        fonts=tuple(FONTS[i] for i in rng.choice(len(FONTS), 4, replace=False)),
        ink=(int(ink[0]), int(ink[1]), int(ink[2])),
        paper=(int(paper[0]), int(paper[1]), int(paper[2])),
        tilt=float(rng.uniform(-20, 20)),
        slant=float(rng.uniform(-0.3, 0.3)),
        height=float(rng.uniform(18, 26)),
        neighbours=float(rng.uniform(0.2, 0.8)),
        scratches=int(rng.integers(0, 4)),
        noise=int(rng.integers(10, 30)),
    )


def glyph_images(
    num: int, style: GlyphStyle, *, seed: int, classes: Sequence[int] = tuple(range(len(CLASSES)))
) -> ImageSamples:
    """``num`` images (num, 32, 32, 3) of ``classes``, in equal numbers and random order."""
    rng = np.random.default_rng([13, seed])
    labels = rng.permutation(np.resize(np.asarray(classes, np.int64), num))
    ink = np.empty((num, SIDE, SIDE), np.uint8)
    scratched = np.zeros((num, SIDE, SIDE), np.uint8)
    for index, label in enumerate(labels):
        ink[index] = _strokes(int(label), style, rng)
        if style.scratches:
            scratched[index] = _scratches(style.scratches, rng)
    colours = np.array([style.paper, style.ink, rng.integers(0, 256, 3)], np.int32)
    spread = rng.integers(-COLOUR_SPREAD, COLOUR_SPREAD + 1, (num, 3, 3), dtype=np.int32)
    paper, pen, scratch = ((colours[None] + spread)[:, i, None, None, :] for i in range(3))  # (num, 1, 1, 3)
    pixels = np.empty((num, SIDE, SIDE, 3), np.uint8)
    for start in range(0, num, 256):  # int32 images of all would take four times the memory
        part = slice(start, start + 256)
        mask, lines = ink[part, ..., None].astype(np.int32), scratched[part, ..., None].astype(np.int32)
        drawn = (paper[part] * (255 - mask) + pen[part] * mask) // 255
        drawn = (drawn * (255 - lines) + scratch[part] * lines) // 255
        drawn += rng.integers(-style.noise, style.noise + 1, drawn.shape, dtype=np.int32)
        pixels[part] = drawn.clip(0, 255)
    return ImageSamples(pixels, labels, CLASSES)


def _strokes(label: int, style: GlyphStyle, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Amount of ink per pixel, (32, 32) uint8, of the digit and its neighbours."""
    font = style.fonts[int(rng.integers(len(style.fonts)))]
    tilt, slant, height, across, down = rng.uniform(-1, 1, 5)
    angle = math.radians(style.tilt + TILT_SPREAD * tilt)
    scale = _digit_height(font) / (style.height * (1 + HEIGHT_SPREAD * height))  # canvas pixels per image pixel
    shear = style.slant + SLANT_SPREAD * slant
    middle = SIDE / 2
    # The position of image pixel (x, y) on the canvas: shifted, rotated, sheared and scaled about the centres.
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    a, b, d, e = cos + shear * sin, -sin + shear * cos, sin, cos
    x, y = middle + SHIFT_PIXELS * across, middle + SHIFT_PIXELS * down
    left, top = _CANVAS / 2 - a * x - b * y, _CANVAS / 2 - d * x - e * y

    def placed(digit: int, offset: float) -> npt.NDArray[np.uint8]:
        matrix = (a, b, left + offset, d, e, top)
        return np.asarray(
            _drawn(font, digit).transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        )

    strokes = placed(label, 0.0)
    if rng.random() < style.neighbours:
        before, after = rng.integers(0, len(CLASSES), 2)
        advance = _digit_width(font) * rng.uniform(1.0, 1.3)
        strokes = np.maximum(strokes, np.maximum(placed(int(before), advance), placed(int(after), -advance)))
    return strokes


def _scratches(count: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Lines across the image, (32, 32) uint8."""
    lines = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(lines)
    for x0, y0, x1, y1, width in rng.integers(0, SIDE, (count, 5)).tolist():
        draw.line((x0, y0, x1, y1), fill=255, width=1 + width % 2)
    return np.asarray(lines)


@functools.lru_cache(maxsize=len(FONTS) * len(CLASSES))
def _drawn(font: str, digit: int) -> Image.Image:
    """A digit in white on black, with its bounding box in the centre of the canvas."""
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    face = _face(font)
    left, top, right, bottom = face.getbbox(CLASSES[digit])
    corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, CLASSES[digit], fill=255, font=face)
    return canvas


@functools.lru_cache(maxsize=len(FONTS))
def _face(font: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    try:
        return ImageFont.truetype(str(path), _POINTS, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(
            f"cannot read the font {path} of matplotlib: {error}", remedy="Reinstall matplotlib, or use files as data."
        ) from error


@functools.lru_cache(maxsize=len(FONTS))
def _digit_height(font: str) -> float:
    _, top, _, bottom = _face(font).getbbox("8")
    return bottom - top


@functools.lru_cache(maxsize=len(FONTS))
def _digit_width(font: str) -> float:
    left, _, right, _ = _face(font).getbbox("0")
    return right - left


def _brightness(colour: npt.NDArray[np.int64]) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114]))
