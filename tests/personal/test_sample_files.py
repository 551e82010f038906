"""Images from .npz files and folders: every accepted form gives the same pixels, everything else a named error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgefed.errors import DataError, EdgefedError
from edgefed.personal import sample_files
from edgefed.personal.sample_files import load_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("names", sample_files.ARRAY_NAMES, ids=" ".join)
def test_npz_by_every_pair_of_names(tmp_path, names):
    path = saved(tmp_path / "d.npz", **dict(zip(names, (PIXELS, LABELS), strict=True)))
    samples = load_images(path)
    np.testing.assert_array_equal(samples.images, PIXELS)
    np.testing.assert_array_equal(samples.labels, LABELS)
    assert samples.labels.dtype == np.int64
    assert samples.classes == ("0", "1", "2")


def test_named_classes_stay_even_where_a_client_has_no_example_of_them(tmp_path):
    path = saved(tmp_path / "d.npz", images=PIXELS, labels=LABELS, classes=np.array(["ant", "bee", "cow", "dog"]))
    assert load_images(str(path)).classes == ("ant", "bee", "cow", "dog")


def test_labels_may_be_strings_or_a_column(tmp_path):
    words = load_images(saved(tmp_path / "a.npz", images=PIXELS, labels=np.array(list("cabcab"))))
    assert words.classes == ("a", "b", "c")
    np.testing.assert_array_equal(words.labels, [2, 0, 1, 2, 0, 1])
    column = load_images(saved(tmp_path / "b.npz", images=PIXELS, labels=LABELS[:, None].astype(np.uint8)))
    np.testing.assert_array_equal(column.labels, LABELS)


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 32, 32, 1)])
def test_grey_images_get_three_equal_channels_and_it_is_said(tmp_path, shape):
    notes = []
    samples = load_images(
        saved(tmp_path / "d.npz", images=PIXELS[..., 0].reshape(shape), labels=LABELS), report=notes.append
    )
    for channel in range(3):
        np.testing.assert_array_equal(samples.images[..., channel], PIXELS[..., 0])
    assert len(notes) == 1
    assert "grey" in notes[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1_give_the_bytes_they_came_from_and_it_is_said(tmp_path, dtype):
    notes = []
    path = saved(tmp_path / "d.npz", images=(PIXELS / 255).astype(dtype), labels=LABELS)
    np.testing.assert_array_equal(load_images(path, report=notes.append).images, PIXELS)
    assert len(notes) == 1
    assert "float" in notes[0]


def test_a_single_class_is_fine_and_unread_arrays_are_named(tmp_path):
    notes = []
    path = saved(tmp_path / "d.npz", x_train=PIXELS, y_train=np.zeros(6, int), x_test=PIXELS, y_test=LABELS)
    assert load_images(path, report=notes.append).classes == ("0",)
    assert notes == ["ignored arrays: x_test, y_test"]


def test_another_size_is_an_error_that_names_both_and_resize_scales_it(tmp_path):
    large = np.repeat(np.repeat(PIXELS, 2, axis=1), 2, axis=2)
    path = saved(tmp_path / "d.npz", images=large, labels=LABELS)
    with pytest.raises(DataError, match=r"64x64 \(6\); expected 32x32") as error:
        load_images(path)
    assert "`resize`" in error.value.remedy
    notes = []
    scaled = load_images(path, resize=True, report=notes.append)
    assert scaled.images.shape == (6, 32, 32, 3)
    assert "64x64 to 32x32" in notes[0]
    assert load_images(path, size=(64, 64)).images.shape == (6, 64, 64, 3)


FINE = {"images": PIXELS, "labels": LABELS}
NAN = np.where(np.arange(6 * 32 * 32 * 3).reshape(PIXELS.shape) == 3, np.nan, 0.5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS, "labels": LABELS}, "has labels, pictures; expected images and labels"),
        ({}, "has no array"),
        ({**FINE, "labels": LABELS - 1}, "label -1 of image 0"),
        ({**FINE, "classes": np.array(["a", "b"])}, "label 2 of image 2 .* 2 named classes allow 0 to 1"),
        ({**FINE, "labels": LABELS + 10**6}, "out of range: must be 0 to 65535"),
        ({**FINE, "labels": np.array([2**64 - 1] * 6, np.uint64)}, "out of range"),
        ({**FINE, "labels": LABELS[:5]}, "6 images but 5 labels"),
        ({**FINE, "labels": LABELS.astype(float)}, "labels of .* are float64"),
        ({**FINE, "labels": np.eye(3)[LABELS].astype(int)}, r"of shape \(6, 3\)"),
        ({**FINE, "labels": np.array(list("abcabc")), "classes": np.array(["a", "b"])}, "'c' .* is not one of"),
        ({**FINE, "classes": np.array(["a", "a", "b"])}, "classes of .* distinct strings"),
        ({**FINE, "classes": np.arange(3)}, "classes of .* is int64"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, "no example"),
        ({"images": PIXELS.transpose(0, 3, 1, 2), "labels": LABELS}, r"shape \(6, 3, 32, 32\)"),
        ({"images": PIXELS[0, 0], "labels": LABELS}, r"shape \(32, 3\)"),
        ({"images": PIXELS.astype(np.int64), "labels": LABELS}, "are int64"),
        ({"images": PIXELS.astype(np.float32), "labels": LABELS}, "floats from 0 to 255"),
        ({"images": NAN, "labels": LABELS}, "NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arrays_are_named(tmp_path, arrays, message):
    path = saved(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as error:
        load_images(path)
    assert error.value.remedy != DataError.default_remedy


def test_nothing_is_unpickled(tmp_path):
    path = saved(tmp_path / "d.npz", images=PIXELS, labels=np.array(["a", None] * 3, dtype=object))
    with pytest.raises(DataError, match="cannot read .*pickle"):
        load_images(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_not_an_archive_is_unreadable(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load_images(tmp_path / "d.npz")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = saved(tmp_path_factory.mktemp("fuzz") / "d.npz", images=PIXELS[:2], labels=LABELS[:2])
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_gives_named_errors_only(archive, data):
    path, good = archive
    damaged = bytearray(good)
    # Where headers are: the first bytes, and the end with the second member and the directory.
    places = st.one_of(st.integers(0, 200), st.integers(len(good) - 600, len(good) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(places)] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(good), len(good) - 30, 100]))])
    try:
        samples = load_images(path)
    except EdgefedError:
        return
    assert samples.images.dtype == np.uint8
    assert len(samples) == len(samples.images)


def folder_of(tmp_path, suffix=".png", mode="RGB"):
    for index, label in enumerate(LABELS):
        folder = tmp_path / "set" / ("zebra", "ant", "mole")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[index]).convert(mode).save(folder / f"{index}{suffix}", lossless=True, quality=95)
    return tmp_path / "set"


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".PNG"])
def test_a_folder_has_a_class_per_subfolder(tmp_path, suffix):
    root = folder_of(tmp_path, suffix)
    (root / ".hidden").mkdir()
    (root / "ant" / ".1.png").write_bytes(b"hidden files are passed over")
    (root / "ant" / "notes.txt").write_text("so are other kinds")
    samples = load_images(root)
    assert samples.classes == ("ant", "mole", "zebra")
    np.testing.assert_array_equal(samples.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(samples.images, PIXELS[[1, 4, 2, 5, 0, 3]])


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_photographs_are_read(tmp_path, suffix):
    root = folder_of(tmp_path, suffix)
    assert load_images(root).images.shape == PIXELS.shape


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    grey = PIXELS[0, ..., 0]
    Image.fromarray(grey).save(folder / "1-grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "2-deep.png")
    Image.fromarray(np.dstack([PIXELS[0], np.zeros((32, 32), np.uint8)])).save(folder / "3-clear.png")
    Image.fromarray(PIXELS[0]).quantize(16).save(folder / "4-palette.png")
    images = load_images(tmp_path / "set").images
    np.testing.assert_array_equal(images[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(images[1], images[0])  # 16 bits scaled, not clipped
    assert (images[2] == 255).all()  # transparent pixels show the white below
    np.testing.assert_array_equal(
        images[3], np.asarray(Image.fromarray(PIXELS[0]).quantize(16).convert("RGB"), np.uint8)
    )


def test_a_camera_held_upright_is_believed(tmp_path):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(PIXELS[0]).save(folder / "1.png", exif=exif)
    np.testing.assert_array_equal(load_images(tmp_path / "set").images[0], np.rot90(PIXELS[0], -1))


def test_sizes_of_a_folder_are_counted_and_resize_crops_at_the_centre(tmp_path):
    root = folder_of(tmp_path)
    wide = np.concatenate([np.zeros((32, 16, 3), np.uint8), PIXELS[0], np.zeros((32, 16, 3), np.uint8)], axis=1)
    Image.fromarray(wide).save(root / "ant" / "0.png")
    with pytest.raises(DataError, match=r"32x64 \(1\); expected 32x32"):
        load_images(root)
    notes = []
    np.testing.assert_array_equal(load_images(root, resize=True, report=notes.append).images[0], PIXELS[0])
    assert "1 of 7 images" in notes[0]


def test_an_empty_class_folder_is_named(tmp_path):
    root = folder_of(tmp_path)
    (root / "bee").mkdir()
    with pytest.raises(DataError, match="class 'bee' is empty"):
        load_images(root)


def test_folders_without_classes_and_broken_images_are_named(tmp_path):
    with pytest.raises(DataError, match="no subfolder"):
        load_images(tmp_path)
    root = folder_of(tmp_path)
    whole = (root / "mole" / "2.png").read_bytes()
    for content in (b"no image", whole[:60], whole[:-200], b""):
        (root / "mole" / "2.png").write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read the image .*2\.png"):
            load_images(root)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    root = folder_of(tmp_path)
    monkeypatch.setattr(sample_files, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="has 32 x 32 pixels"):
        load_images(root)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # pillow's own limit, whether it warns or raises
    with pytest.raises(DataError, match="cannot read the image"):
        load_images(root)


def test_a_missing_or_wrong_kind_of_file_is_named(tmp_path):
    with pytest.raises(DataError, match="file or folder not found"):
        load_images(tmp_path / "nothing.npz")
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(DataError, match="neither a .npz file nor a folder"):
        load_images(tmp_path / "d.txt")
