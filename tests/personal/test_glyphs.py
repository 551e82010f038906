"""The embedded images: repeatable, balanced, unlike from client to client, and neither trivial nor hopeless."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgefed.errors import DataError
from edgefed.personal.glyphs import (
    CLASSES,
    CLASSES_PER_CLIENT,
    FONTS,
    classes_of,
    glyph_client,
    glyph_images,
    is_glyphs,
    load_glyphs,
    style_of,
)
from edgefed.personal.local_training import cross_entropy
from edgefed.personal.networks import make_cnn
from edgefed.personal.samples import batches


def test_a_client_has_its_classes_alike_often():
    samples = load_glyphs("glyphs:3")
    assert samples.images.shape == (200, 32, 32, 3)
    assert samples.images.dtype == np.uint8
    assert samples.labels.dtype == np.int64
    assert samples.classes == CLASSES
    found, counts = np.unique(samples.labels, return_counts=True)
    assert tuple(found) == classes_of(3)
    assert set(counts) == {40}


def test_the_same_bytes_in_another_process_and_others_for_another_seed():
    code = (
        "from edgefed.personal.glyphs import glyph_client as g; import hashlib; "
        "print(hashlib.sha256(g(5, 40).images.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(glyph_client(5, 40).images.tobytes()).hexdigest()
    assert not np.array_equal(glyph_client(5, 40).images, glyph_client(5, 40, seed=1).images)
    assert not np.array_equal(glyph_client(5, 40).images, glyph_client(6, 40).images)


def test_seeds_of_clients_do_not_meet():
    seen = [glyph_client(client, 6, seed=seed).images.tobytes() for seed in range(3) for client in (0, 1, 999)]
    assert len(set(seen)) == 9


def test_clients_are_unlike_by_class_and_by_style():
    for pair in range(0, 20, 2):
        assert not set(classes_of(pair)) & set(classes_of(pair + 1))
    assert len({classes_of(client) for client in range(10)}) == 10
    styles = [style_of(client) for client in range(20)]
    assert all(len(set(style.fonts)) == len(style.fonts) and set(style.fonts) <= set(FONTS) for style in styles)
    for field in dataclasses.fields(styles[0]):
        assert len({getattr(style, field.name) for style in styles}) >= (4 if field.name == "scratches" else 10)


def test_every_font_has_every_digit():
    still = dataclasses.replace(style_of(0), neighbours=0.0, scratches=0, noise=0, ink=(0, 0, 0), paper=(255, 255, 255))
    for font in FONTS:
        images = glyph_images(10, dataclasses.replace(still, fonts=(font,)), seed=0).images
        dark = (images.mean(axis=3) < 128).mean(axis=(1, 2))  # share of each picture that is ink
        assert (dark > 0.01).all(), font
        assert (dark < 0.5).all(), font


@pytest.mark.parametrize("number", ["", "x", "-1", "1000", "1.5", "00001", "٣"])
def test_other_clients_are_refused_by_name(number):
    assert is_glyphs(f"glyphs:{number}")
    with pytest.raises(DataError, match="invalid client number"):
        load_glyphs(f"glyphs:{number}")


def test_a_path_is_not_taken_for_them():
    assert not is_glyphs("./glyphs.npz")


def test_a_network_learns_its_own_client_but_not_at_once():
    """cnn5 alone on 200 images: after ten epochs well above chance (1 in 5) on new images, and not perfect."""
    torch.manual_seed(0)
    model, samples, new = make_cnn("cnn5", len(CLASSES)), glyph_client(3, 200), glyph_client(3, 200, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rng = np.random.default_rng(0)
    for _ in range(10):
        for batch in batches(samples, 16, rng):
            optimizer.zero_grad()
            cross_entropy(model(batch.own), batch.labels).backward()
            optimizer.step()
    held_out = new.batch(np.arange(len(new)))
    with torch.no_grad():
        accuracy = float((model(held_out.own).argmax(1) == held_out.labels).float().mean())
    assert 2 / CLASSES_PER_CLIENT < accuracy < 0.97
