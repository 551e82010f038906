"""A client's labelled images: one .npz file of arrays, or a folder with one subfolder per class.

Array names of a .npz file, tried in this order; an array ``classes`` with the names of the classes is optional:

    images, labels          x, y          x_train, y_train

    images   uint8 0..255 or float 0..1; (N, H, W, 3), or greyscale (N, H, W) or (N, H, W, 1)
    labels   integers from 0, (N,) or (N, 1); without ``classes`` their numbers are the names
             or strings; without ``classes`` the sorted distinct strings are the classes

The classes of a folder are its subfolders, sorted; hidden files and other file types are ignored. Greyscale images are
repeated to three channels, transparent pixels are composited on white, EXIF orientation is applied, and the first frame
of an animation is used. Files are not trusted: nothing is unpickled, and no image above `MAX_PIXELS` is decoded.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from edgefed.errors import DataError
from edgefed.personal.labelled_text import MAX_CLASSES
from edgefed.personal.samples import ImageSamples, IntArray

Array: TypeAlias = npt.NDArray[Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
ARRAY_NAMES = (("images", "labels"), ("x", "y"), ("x_train", "y_train"))
MAX_PIXELS = 64 * 1024 * 1024
"""Maximum pixels of an image file, above that of any camera; 192 MiB when decoded."""

FORMS = "Use a .npz file with images and labels, or a folder of images with one subfolder per class."
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error,
    tokenize.TokenError, zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""Exceptions of numpy and pillow for damaged files."""


def load_images(
    path: str | Path,
    size: tuple[int, int] = (32, 32),
    *,
    resize: bool = False,
    report: Callable[[str], None] = lambda note: None,
) -> ImageSamples:
    """Read all images of ``path`` into memory, uint8 (N, H, W, 3).

    Args:
        path: a .npz file or a folder.
        size: (height, width) that every image must have.
        resize: scale images of another size, and crop them at the centre.
        report: called with each conversion of the data (floats, greyscale, size) and with ignored arrays.

    Raises:
        DataError: nothing found, damaged files, unknown arrays, other sizes, invalid or missing labels, NaN, no
            example, or an empty class folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_folder(path, size, resize, report)
    if not path.exists():
        raise DataError(f"file or folder not found: {path}", remedy="Check the path.")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path} is neither a .npz file nor a folder", remedy=FORMS)
    images, labels, classes = _read_npz(path, report)
    images = _as_rgb(images, path, report)
    numbers, names = _as_labels(labels, classes, path)
    if len(numbers) != len(images):
        raise DataError(
            f"{path} has {len(images):,} images but {len(numbers):,} labels", remedy="Each image needs one label."
        )
    if not len(images):
        raise DataError(f"{path} has no example", remedy=FORMS)
    return ImageSamples(_as_size(images, size, resize, path, report), numbers, names)


def load_image_files(files: Sequence[Path], size: tuple[int, int] = (32, 32)) -> ImageSamples:
    """Read image files without labels, scaled to ``size`` and cropped at the centre. Raises DataError."""
    images = np.empty((len(files), *size, 3), np.uint8)
    for index, file in enumerate(files):
        if not file.is_file():
            raise DataError(f"image not found: {file}", remedy="Check the path.")
        images[index] = np.asarray(_fitted(_open_image(file), size))
    return ImageSamples(images, np.zeros(len(files), np.int64), ("",))


def _read_npz(path: Path, report: Callable[[str], None]) -> tuple[Array, Array, Array | None]:
    """(images, labels, classes or None), unchecked."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a .npz archive")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # np.load leaves a bad file open
            found = set(archive.files)
            pair = next((names for names in ARRAY_NAMES if found.issuperset(names)), None)
            if pair is None:
                known = ", ".join(" and ".join(names) for names in ARRAY_NAMES)
                raise DataError(
                    f"{path} has {', '.join(sorted(found)[:8]) or 'no array'}; expected {known}", remedy=FORMS
                )
            unread = sorted(found.difference(pair, ["classes"]))
            if unread:
                report(f"ignored arrays: {', '.join(unread[:8])}")
            arrays = [archive[name] for name in pair]
            if "classes" in found:
                arrays.append(archive["classes"])
            if any(isinstance(array, bytes) for array in arrays):  # numpy returns bytes for other members
                raise ValueError("a member is not an array")
            return arrays[0], arrays[1], arrays[2] if "classes" in found else None
    except _UNREADABLE as error:
        raise DataError(f"cannot read {path}: {error}", remedy="Save it again with numpy.savez.") from error
    except MemoryError as error:
        raise DataError(
            f"{path} does not fit into memory", remedy="Make it smaller, for example with uint8."
        ) from error


def _as_rgb(images: Array, path: Path, report: Callable[[str], None]) -> npt.NDArray[np.uint8]:
    """Images of any supported shape and type as uint8 (N, H, W, 3)."""
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    if not grey and (images.ndim != 4 or images.shape[3] != 3):
        hint = " Put the channels last: images.transpose(0, 2, 3, 1)." if images.ndim == 4 else ""
        raise DataError(
            f"the images of {path} have shape {images.shape}; expected (N, H, W, 3), (N, H, W, 1) or (N, H, W)",
            remedy=FORMS + hint,
        )
    if images.dtype.kind == "f":
        images = _from_floats(images, path)
        report("floats 0..1 converted to 0..255")
    elif images.dtype != np.uint8:
        raise DataError(
            f"the images of {path} are {images.dtype}; expected uint8 from 0 to 255 or float from 0 to 1",
            remedy="Convert them with images.astype('uint8').",
        )
    if grey:
        report("greyscale images repeated to three channels")
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
    return np.ascontiguousarray(images)


def _from_floats(images: Array, path: Path) -> npt.NDArray[np.uint8]:
    """0..1 -> 0..255, a thousand images at a time: a float copy of all would take up to eight times the memory."""
    whole = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000]
        if not np.isfinite(part).all():
            raise DataError(f"the images of {path} have NaN or infinity", remedy="Remove these images.")
        if part.size and not 0 <= part.min() <= part.max() <= 1:
            raise DataError(
                f"the images of {path} are floats from {part.min():.4g} to {part.max():.4g}; expected 0 to 1",
                remedy="Scale them to 0..1, or save them as uint8 from 0 to 255.",
            )
        whole[start : start + 1000] = np.rint(part.astype(np.float32) * 255)
    return whole


def _as_labels(labels: Array, classes: Array | None, path: Path) -> tuple[IntArray, tuple[str, ...]]:
    """(N,) int64 labels and the names of the classes."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"the labels of {path} are {labels.dtype} of shape {labels.shape}; expected integers or strings (N,)",
            remedy="Convert one-hot labels with labels.argmax(1), floats with labels.astype('int64').",
        )
    names = None if classes is None else _class_names(classes, path)
    if labels.dtype.kind == "U":
        known = names or tuple(sorted(set(labels.tolist())))
        missing = sorted(set(labels.tolist()).difference(known))
        if missing:
            raise DataError(
                f"label {missing[0]!r:.60} of {path} is not one of its classes: {_short(known)}",
                remedy="Add it to classes, or omit classes.",
            )
        number = {name: index for index, name in enumerate(known)}
        return np.array([number[name] for name in labels.tolist()], np.int64), known
    limit = MAX_CLASSES if names is None else len(names)
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        where = f"label {labels[wrong[0]]} of image {wrong[0]} in {path} is out of range"
        allowed = f"{len(names)} named classes allow 0 to {limit - 1}" if names else f"must be 0 to {limit - 1}"
        raise DataError(f"{where}: {allowed}", remedy="Number the classes from 0.")
    numbers = labels.astype(np.int64)
    return numbers, names or tuple(str(label) for label in range(int(numbers.max(initial=-1)) + 1))


def _class_names(classes: Array, path: Path) -> tuple[str, ...]:
    names = tuple(str(name) for name in classes.tolist()) if classes.ndim == 1 and classes.dtype.kind == "U" else ()
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"classes of {path} is {classes.dtype} of shape {classes.shape}; expected distinct strings (classes,)",
            remedy="Save it as numpy.array(['cat', 'dog']).",
        )
    return names


def _load_folder(path: Path, size: tuple[int, int], resize: bool, report: Callable[[str], None]) -> ImageSamples:
    """Read a folder with one subfolder per class."""
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        content = [sorted(file for file in folder.iterdir() if _is_image(file)) for folder in folders]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", remedy="Check its permissions.") from error
    if not folders:
        raise DataError(f"{path} has no subfolders; expected one per class", remedy=FORMS)
    for folder, files in zip(folders, content, strict=True):
        if not files:
            raise DataError(
                f"class {folder.name!r} is empty: no {', '.join(IMAGE_SUFFIXES)} file in {folder}",
                remedy="Add images of the class, or remove the folder.",
            )
    labels = np.repeat(np.arange(len(folders)), [len(files) for files in content])
    images = np.empty((len(labels), *size, 3), np.uint8)
    other: Counter[tuple[int, int]] = Counter()
    for index, file in enumerate(file for files in content for file in files):
        image = _open_image(file)
        if (image.height, image.width) != size:
            other[image.height, image.width] += 1
            if not resize:
                continue
            image = _fitted(image, size)
        images[index] = np.asarray(image)
    if other and not resize:
        raise _other_sizes(other, size, path)
    if other:
        report(f"{other.total()} of {len(images)} images scaled to {_by(size)}")
    return ImageSamples(images, labels.astype(np.int64), tuple(folder.name for folder in folders))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _open_image(file: Path) -> Image.Image:
    """An RGB image, upright and composited on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{file} has {image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are supported",
                        remedy="Scale it down, or remove it.",
                    )
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits, which pillow would clip to 255
                    deep = np.asarray(upright).astype(np.uint32) >> 8
                    upright = Image.fromarray(deep.astype(np.uint8))
                if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
                return upright.convert("RGB")
    except _UNREADABLE as error:
        raise DataError(f"cannot read the image {file}: {error}", remedy="Repair it, or remove it.") from error


def _as_size(
    images: npt.NDArray[np.uint8], size: tuple[int, int], resize: bool, path: Path, report: Callable[[str], None]
) -> npt.NDArray[np.uint8]:
    if images.shape[1:3] == size:
        return images
    if not resize or not images.size:
        raise _other_sizes(Counter({images.shape[1:3]: len(images)}), size, path)
    report(f"images scaled from {_by(images.shape[1:3])} to {_by(size)}")
    return np.stack([np.asarray(_fitted(Image.fromarray(image), size)) for image in images])


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale the image to cover ``size``, and crop it at the centre."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def _other_sizes(found: Counter[tuple[int, int]], size: tuple[int, int], path: Path) -> DataError:
    shown = ", ".join(f"{_by(other)} ({count:,})" for other, count in found.most_common(3))
    more = f" and {len(found) - 3} other sizes" if len(found) > 3 else ""
    return DataError(
        f"{path} has images of {shown}{more}; expected {_by(size)} (height x width)",
        remedy="Set `resize` to scale them and crop them at the centre.",
    )


def _by(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
