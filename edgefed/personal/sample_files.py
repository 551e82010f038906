"""A client's labelled images from its disk: one .npz file of arrays, or a folder with one subfolder a class.

Array names of a .npz file, tried in this order; names of the classes may be beside them as ``classes``:

    images, labels          x, y          x_train, y_train

    images   uint8 0..255 or float 0..1; (N, H, W, 3), or grey (N, H, W) or (N, H, W, 1), which becomes three channels
    labels   integers, (N,) or (N, 1), from 0; without ``classes`` they are named by their numbers
             or strings, then the classes are the different ones, sorted

A folder's classes are its subfolders, sorted; hidden files and other kinds of files are passed over. Pixels are laid on
white where an image is transparent, turned as the camera says, and of a moving image the first is taken. Files are
hostile: nothing is unpickled, no image is decoded that claims more than `MAX_PIXELS`.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from edgefed.errors import DataError
from edgefed.personal.batches import ImageSamples

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
ARRAY_NAMES = (("images", "labels"), ("x", "y"), ("x_train", "y_train"))
MAX_PIXELS = 64 * 1024 * 1024
"""Of one image file: more than any camera makes; 192 MiB once decoded."""
MAX_CLASSES = 65536
"""A larger label is a mistake, and would make a header of gigabytes."""

FORMS = "Pass a .npz file with images and labels, or a folder of images with one subfolder a class."
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error,
    tokenize.TokenError, zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What numpy and pillow raise on damaged files."""


def load_images(
    path: str | Path,
    size: tuple[int, int] = (32, 32),
    *,
    resize: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> ImageSamples:
    """Read all images of ``path`` into memory, uint8 (N, H, W, 3).

    ``size``: (height, width) that every image must have; with ``resize`` others are scaled and cropped at their centre.
    ``tell`` gets what was done to the data (floats, grey, scaling) and what was left unread.

    Raises:
        DataError: nothing there, damaged, unknown arrays, other sizes, labels out of range or too few, NaN, no example,
            an empty class folder.

    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_folder(path, size, resize, tell)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}", remedy="Check the path.")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path} is neither a .npz file nor a folder", remedy=FORMS)
    images, labels, classes = _read_npz(path, tell)
    images = _as_rgb(images, path, tell)
    numbers, names = _as_labels(labels, classes, path)
    if len(numbers) != len(images):
        raise DataError(
            f"{path} holds {len(images):,} images and {len(numbers):,} labels", remedy="Each image needs one label."
        )
    if not len(images):
        raise DataError(f"{path} holds no example", remedy=FORMS)
    return ImageSamples(_as_size(images, size, resize, path, tell), numbers, names)


def _read_npz(path: Path, tell: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(images, labels, classes or None) as they are in the file."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz archive")
        with np.load(path, allow_pickle=False) as archive:
            found = set(archive.files)
            pair = next((names for names in ARRAY_NAMES if found.issuperset(names)), None)
            if pair is None:
                known = ", ".join(" and ".join(names) for names in ARRAY_NAMES)
                raise DataError(
                    f"{path} holds {', '.join(sorted(found)[:8]) or 'no array'}; needed are {known}", remedy=FORMS
                )
            unread = sorted(found.difference(pair, ["classes"]))
            if unread:
                tell(f"{', '.join(unread[:8])} not read")
            arrays = [archive[name] if name in found else None for name in (*pair, "classes")]
            if any(isinstance(array, bytes) for array in arrays):  # what numpy makes of a member that is no array
                raise ValueError("it has a member that is no array")
            return arrays[0], arrays[1], arrays[2]
    except _UNREADABLE as fault:
        raise DataError(f"cannot read {path}: {fault}", remedy="Write it again with numpy.savez.") from fault
    except MemoryError as fault:
        raise DataError(f"{path} does not fit into memory", remedy="Make it smaller, for example uint8.") from fault


def _as_rgb(images: np.ndarray, path: Path, tell: Callable[[str], None]) -> np.ndarray:
    """uint8 (N, H, W, 3) of what a file may hold."""
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    if not grey and (images.ndim != 4 or images.shape[3] != 3):
        hint = " Put the channels last: images.transpose(0, 2, 3, 1)." if images.ndim == 4 else ""
        raise DataError(
            f"the images of {path} have shape {images.shape}; needed is (N, H, W, 3), (N, H, W, 1) or (N, H, W)",
            remedy=FORMS + hint,
        )
    if images.dtype.kind == "f":
        images = _from_floats(images, path)
        tell("floats 0..1 taken as 0..255")
    elif images.dtype != np.uint8:
        raise DataError(
            f"the images of {path} are {images.dtype}; needed is uint8 from 0 to 255 or float from 0 to 1",
            remedy="Convert them with images.astype('uint8').",
        )
    if grey:
        tell("grey images repeated to three channels")
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
    return np.ascontiguousarray(images)


def _from_floats(images: np.ndarray, path: Path) -> np.ndarray:
    """0..1 -> 0..255, by a thousand images at a time: a copy of all as floats would be eight times the result."""
    whole = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000]
        if not np.isfinite(part).all():
            raise DataError(f"the images of {path} hold NaN or infinity", remedy="Leave these images out.")
        if part.size and not 0 <= part.min() <= part.max() <= 1:
            raise DataError(
                f"the images of {path} are floats from {part.min():.4g} to {part.max():.4g}; needed is 0 to 1",
                remedy="Scale them to 0..1, or save uint8 from 0 to 255.",
            )
        whole[start : start + 1000] = np.rint(part.astype(np.float32) * 255)
    return whole


def _as_labels(labels: np.ndarray, classes: np.ndarray | None, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 and the names of the classes."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"the labels of {path} are {labels.dtype} of shape {labels.shape}; needed are integers or strings, (N,)",
            remedy="One-hot labels become integers with labels.argmax(1), floats with labels.astype('int64').",
        )
    names = None if classes is None else _class_names(classes, path)
    if labels.dtype.kind == "U":
        known = names or tuple(sorted(set(labels.tolist())))
        missing = sorted(set(labels.tolist()).difference(known))
        if missing:
            raise DataError(
                f"label {missing[0]!r:.60} of {path} is not one of its classes: {_short(known)}",
                remedy="Add it to classes, or leave classes out.",
            )
        number = {name: index for index, name in enumerate(known)}
        return np.array([number[name] for name in labels.tolist()], np.int64), known
    limit = MAX_CLASSES if names is None else len(names)
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        where = f"label {labels[wrong[0]]} of image {wrong[0]} in {path} is out of range"
        allowed = f"{len(names)} named classes allow 0 to {limit - 1}" if names else f"allowed are 0 to {limit - 1}"
        raise DataError(f"{where}: {allowed}", remedy="Number the classes from 0.")
    numbers = labels.astype(np.int64)
    return numbers, names or tuple(str(label) for label in range(int(numbers.max(initial=-1)) + 1))


def _class_names(classes: np.ndarray, path: Path) -> tuple[str, ...]:
    names = tuple(str(name) for name in classes.tolist()) if classes.ndim == 1 and classes.dtype.kind == "U" else ()
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"classes of {path} is {classes.dtype} of shape {classes.shape}; needed are different strings, (classes,)",
            remedy="Save it as numpy.array(['cat', 'dog']).",
        )
    return names


def _load_folder(path: Path, size: tuple[int, int], resize: bool, tell: Callable[[str], None]) -> ImageSamples:
    """One subfolder a class."""
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        content = [sorted(file for file in folder.iterdir() if _is_image(file)) for folder in folders]
    except OSError as fault:
        raise DataError(f"cannot read {path}: {fault}", remedy="Check its permissions.") from fault
    if not folders:
        raise DataError(f"{path} has no subfolder, and each is a class", remedy=FORMS)
    for folder, files in zip(folders, content, strict=True):
        if not files:
            raise DataError(
                f"class {folder.name!r} is empty: {folder} holds no {', '.join(IMAGE_SUFFIXES)} file",
                remedy="Put images of the class there, or remove the folder.",
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
        tell(f"{other.total()} of {len(images)} images scaled to {_by(size)}")
    return ImageSamples(images, labels.astype(np.int64), tuple(folder.name for folder in folders))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _open_image(file: Path) -> Image.Image:
    """An RGB image, upright and on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{file} claims {image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are read",
                        remedy="Scale it down, or leave it out.",
                    )
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits, which pillow would clip to 255
                    deep = np.asarray(upright).astype(np.uint32) >> 8
                    upright = Image.fromarray(deep.astype(np.uint8))
                if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
                return upright.convert("RGB")
    except _UNREADABLE as fault:
        raise DataError(f"cannot read the image {file}: {fault}", remedy="Repair it, or leave it out.") from fault


def _as_size(
    images: np.ndarray, size: tuple[int, int], resize: bool, path: Path, tell: Callable[[str], None]
) -> np.ndarray:
    if images.shape[1:3] == size:
        return images
    if not resize or not images.size:
        raise _other_sizes(Counter({images.shape[1:3]: len(images)}), size, path)
    tell(f"images scaled from {_by(images.shape[1:3])} to {_by(size)}")
    return np.stack([np.asarray(_fitted(Image.fromarray(image), size)) for image in images])


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled until the image covers ``size``, cropped at its centre."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def _other_sizes(found: Counter[tuple[int, int]], size: tuple[int, int], path: Path) -> DataError:
    shown = ", ".join(f"{_by(other)} ({count:,})" for other, count in found.most_common(3))
    more = f" and {len(found) - 3} other sizes" if len(found) > 3 else ""
    return DataError(
        f"{path} has images of {shown}{more}; needed is {_by(size)} (height x width)",
        remedy="Set `resize` to scale them and crop them at the centre.",
    )


def _by(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
