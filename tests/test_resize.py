"""The resize that caches and loaders rely on: these bytes on every processor, from every implementation of it."""

import hashlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, absent
from PIL import Image

from pipelines.images.resize import resize, resize_reference

# Of shapes(): as torch 2.15's AVX2 code made them. A change here makes every teacher cache of resized images wrong.
GOLDEN = "879a591818f0177e125bdc9bc478c870"


def shapes() -> list[tuple[int, int, int]]:
    """Heights, widths and output sizes: shrunk, enlarged, single pixels, sizes that no vector divides."""
    rng = np.random.default_rng(0)
    drawn = [
        (int(h), int(w), int(s)) for h, w, s in zip(*rng.integers(1, [[400], [400], [250]], (3, 120)), strict=True)
    ]
    return [*drawn, (1, 1, 1), (1, 300, 7), (300, 1, 64), (5, 9, 1), (2, 2, 224), (1500, 40, 16)]


def picture(height: int, width: int) -> torch.Tensor:
    """uint8 [3, height, width], the same everywhere."""
    values = np.arange(3 * height * width, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return torch.from_numpy((values >> np.uint64(56)).astype(np.uint8).reshape(3, height, width))


def digest(resized: list[torch.Tensor]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for image in resized:
        state.update(image.contiguous().numpy().tobytes())
    return state.hexdigest()


def test_the_reference_gives_the_golden_bytes() -> None:
    assert digest([resize_reference(picture(h, w), s) for h, w, s in shapes()]) == GOLDEN
    row = torch.tensor([0, 10, 200, 255, 3, 90], dtype=torch.uint8).expand(3, 2, 6)
    assert resize_reference(row, 4)[0, 0].tolist() == [4, 143, 165, 57]
    assert resize_reference(row, 9)[0, 0].tolist() == [0, 5, 42, 168, 228, 213, 45, 47, 90]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_fast_resize_gives_the_references_bytes(channels_last: bool) -> None:
    images = [picture(h, w) for h, w, _ in shapes()]
    if channels_last:
        images = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    assert digest([resize(image, s) for image, (_, _, s) in zip(images, shapes(), strict=True)]) == GOLDEN


def test_it_is_pillows_resize_within_rounding() -> None:
    for height, width, size in shapes():
        image = picture(height, width)
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
        difference = resize_reference(image, size).permute(1, 2, 0).numpy().astype(int) - np.array(expected)
        assert np.abs(difference).max() <= 2


def test_it_is_the_same_on_a_processor_without_avx() -> None:
    """ATen, oneDNN and the compiled kernel of the loaders, each held to the oldest x86."""
    plain = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "NUMBA_CPU_NAME": "generic"}
    here = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import test_resize; "
    ran = subprocess.run(
        [sys.executable, "-c", here + "test_resize.print_digests()"],
        env={**os.environ, **plain, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [GOLDEN] * len(ran.stdout.split()) != [], ran.stdout
    if importlib.util.find_spec("numba") is None:
        absent("numba is not installed")
    assert len(ran.stdout.split()) == 2


def print_digests() -> None:
    """Of `resize`, and of the compiled kernel where numba is installed."""
    print(digest([resize(picture(h, w), s) for h, w, s in shapes()]))
    if importlib.util.find_spec("numba") is not None:
        print(digest([compiled(picture(h, w), s) for h, w, s in shapes()]))


def compiled(image: torch.Tensor, size: int) -> torch.Tensor:
    """The whole of uint8 [3, H, W], resized by the loaders' compiled kernel."""
    from pipelines.images.renderer_kernel import render_samples

    _, height, width = image.shape
    pixels = np.concatenate([image.permute(1, 2, 0).numpy().reshape(-1), np.zeros(8, np.uint8)])
    pixels.flags.writeable = False  # as a mapped file
    out, failed = np.empty(size * size * 3, np.uint8), np.zeros(1, np.bool_)
    one, whole = np.zeros(1, np.int64), np.array([[[0, 0, height, width]]], np.int32)
    render_samples(
        0,  # no decoders: the image is raw
        0,
        0,
        pixels,
        one,
        np.array([height * width * 3]),
        np.array([[height, width]], np.int32),
        np.ones(1, np.bool_),  # raw
        whole,
        np.zeros((1, 1), np.bool_),
        np.array([size]),
        out,
        one,
        failed,
        np.empty(0, np.uint8),
        np.empty((height + 1) * size * 3 + 1, np.uint8),
    )
    return torch.from_numpy(out).view(size, size, 3).permute(2, 0, 1)


def test_the_compiled_kernel_gives_the_references_bytes() -> None:
    if importlib.util.find_spec("numba") is None:
        absent("numba is not installed")
    assert digest([compiled(picture(h, w), s) for h, w, s in shapes()]) == GOLDEN
