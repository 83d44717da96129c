"""The inversion example: the image from a plain update, noise from the masked upload of that very update."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def invert(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("inversion/invert.py")


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins of the shape and dtype of Fashion-MNIST's: a bright square each, at another place, on a dim ground."""
    pixels = np.random.default_rng(7).integers(0, 60, (count, 28, 28))
    for k in range(count):
        pixels[k, 3 * k : 3 * k + 9, 5:20] += 150
    return pixels.astype(np.uint8), np.arange(count, dtype=np.uint8) % 10


def test_an_image_is_read_from_a_plain_update_and_not_from_its_masked_upload(invert: ModuleType) -> None:
    pixels, labels = images(4)
    shown = invert.demonstrate(pixels, labels)
    for one, image in zip(shown, pixels, strict=True):
        plain, masked, summed = one.cosines
        assert plain > 0.999
        assert abs(masked) < 0.2
        assert np.allclose(one.plain, image.reshape(-1) / 255, atol=1e-3)
        assert 0.2 < summed < 0.95  # a mixture: masks do not hide what the sum itself says


def test_the_uploads_of_the_demonstration_are_those_of_its_updates(invert: ModuleType, tmp_path: Path) -> None:
    """Their sum is the sum of the updates, to half a unit of the fixed point each, which is 2^-30 for three clients."""
    updates, layout = invert.train(*images(3), tmp_path)
    _, total = invert.masked_round(updates, layout)
    assert np.abs(total - updates.sum(0, dtype=np.float64)).max() <= 3 * 2.0**-30 * (1 + 1e-6)
    assert np.abs(updates).max() < invert.CLIP_VALUE


def test_the_picture_is_a_png_of_all_clients(
    invert: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = images(4)
    np.savez(tmp_path / "images.npz", x_train=pixels, y_train=labels)
    given = ["invert.py", "--data", f"{tmp_path}/images.npz", "--to", f"{tmp_path}/made", "--clients", "3"]
    monkeypatch.setattr(sys, "argv", given)
    invert.main()
    assert capsys.readouterr().out.count("client-0") == 3
    data = (tmp_path / "made" / "inversion.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (4 * 32 * 3, 3 * 32 * 3)
    lines = np.frombuffer(zlib.decompress(data[data.index(b"IDAT") + 4 : -16]), np.uint8).reshape(height, width + 1)
    first = lines[6:90:3, 7:91:3]  # the first tile without its margin, each pixel of it once
    assert np.array_equal(first, invert.tile(pixels[0].reshape(-1) / 255))


def test_wrong_arguments_are_told(invert: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["invert.py", "--data", f"{tmp_path}/none.npz"])
    with pytest.raises(SystemExit, match="there is no"):
        invert.main()
    monkeypatch.setattr(sys, "argv", ["invert.py", "--data", f"{tmp_path}/none.npz", "--clients", "2"])
    with pytest.raises(SystemExit, match="needs 3"):
        invert.main()
