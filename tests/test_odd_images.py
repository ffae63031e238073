"""Images as they come: every kind gives its right pixels, and no file ends or blocks the process."""

import base64
import hashlib
import io
import os
import random
import resource
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from pipelines.base import LoaderOptions, open_loader
from pipelines.image_folder import UNREADABLE, index_image_folder
from pipelines.images.decode import decode, image_size
from pipelines.plan import EpochPlan
from pipelines.views import Center


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pgm(gray: NDArray[np.uint16]) -> bytes:
    """16 bits, which Pillow 10 reads and does not write."""
    height, width = gray.shape
    return b"P5 %d %d 65535\n" % (width, height) + gray.astype(">u2").tobytes()


def chunk(name: bytes, data: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ damage)


def png(
    rows: bytes, height: int, width: int, *, bits: int = 8, color: int = 2, interlaced: int = 0, extra: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    pixels = zlib.compress(rows)
    cut = len(pixels) // 2  # two chunks
    body = chunk(b"IDAT", pixels[:cut]) + chunk(b"IDAT", pixels[cut:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return decode(data).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photo(photographs: list[Path]) -> Image.Image:
    with Image.open(photographs[0]) as image:
        return image.convert("RGB").resize((91, 67))


# ---- right pixels


def test_pngs_and_gifs_have_the_pixels_that_torchvision_gives_them(photo: Image.Image) -> None:
    """Pillow decodes them here; torchvision.io, which crashes on damaged PNGs, is the oracle for whole ones."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))
    files = []
    for image in (photo, noise):
        transparent = image.convert("RGBA")
        transparent.putalpha(image.convert("L"))
        for each in (
            *(image.convert(mode) for mode in ("RGB", "L", "1", "P")),
            transparent,
            transparent.convert("LA"),
        ):
            files.append(encoded(each, "PNG"))
        files += [encoded(image.quantize(2**bits), "PNG", bits=bits) for bits in (1, 2, 4)]
        files += [
            encoded(image.convert("P"), "PNG", transparency=3),
            encoded(image, "PNG", transparency=(1, 2, 3)),
        ]
        files += [
            encoded(image.convert("P"), "GIF", transparency=3),
            encoded(image.convert("L"), "GIF", interlace=1),
        ]
    rng = np.random.default_rng(1)
    for bits in (1, 2, 4):  # gray
        files.append(png(b"".join(b"\0" + rng.bytes(2 * bits) for _ in range(9)), 9, 16, bits=bits, color=0))
    gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
    files.append(png(b"".join(b"\0" + rng.bytes(48) for _ in range(9)), 9, 16, extra=gamma))
    for data in files:
        assert torch.equal(
            decode(data), decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        )


# JPEGs of 27 x 21 pixels in base64, and blake2b digests of their pixels [3, H, W] as torchvision 0.29 decoded them.
JPEGS = {
    "4:2:0": (
        "feb8b0644cad32e7aabc1d72cb8e586d",
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAVABsDASIAAhEBAxEB/8QAGAAAAwEBAAAAAAAAAAAAAAAAAAQFAwH/xAApEAABAwMDAgUFAAAAAAAAAAAB"
        "AAIDBBEhEkFRE2EFFCJxwTEyM+Hw/8QAFwEBAQEBAAAAAAAAAAAAAAAAAgQAA//EACERAAIBAwMFAAAAAAAAAAAAAAECAAMREgQT"
        "wSEiIzFh/9oADAMBAAIRAxEAPwCPT09yMKzAwU9O+U2GkYuN9ljSwbkLWrILo4cEg6j24H92RxVgLzkjZsFnadgionkAEuGkX3v+"
        "rqlBAOi30j6cpN4/DBgn7yONh8pKvrqmOskZDK5rGkNAudhnflHbNQ2HEuLALdj7jcj/AC9I6VoBItg+6VohrlL3Zc52TZCEk6Ur"
        "yLSjxkyi1t/EHNJuGBoAt2v8qLq6pMjrlzyXH3OUIWuUBx+cx6k9qz//2Q==",
    ),
    "progressive, 4:2:2": (
        "290836a6ea72d28ac136052b611c45e9",
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wgARCAAVABsDASEAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAABAMCAP/EABgBAAMBAQAAAAAAAAAAAAAAAAEC"
        "AwAE/9oADAMBAAIQAxAAAAEbFXkrce359xNqyEUizf/EABsQAQACAwEBAAAAAAAAAAAAAAIAASEiMRBD/9oACAEBAAEFAiZWpOBV"
        "YNReNqnepHfp2f/EABoRAAIDAQEAAAAAAAAAAAAAAAARAQMxEgL/2gAIAQMBAT8BYzxp1zDKsZZkH//EABsRAAIDAAMAAAAAAAAA"
        "AAAAAAABAhESITJB/9oACAECAQE/Ac2SUReEVb5F1sTyf//EABgQAAMBAQAAAAAAAAAAAAAAAAABERAg/9oACAEBAAY/Ai8JCQ4y"
        "7T//xAAdEAACAwACAwAAAAAAAAAAAAAAAREhMRBRYYHB/9oACAEBAAE/IQWToJJ5or1x79o/uLBySoaVC0nrYlZdQTprs//aAAwD"
        "AQACAAMAAAAQfKnT/8QAGREBAQEBAQEAAAAAAAAAAAAAAQARIWFx/9oACAEDAQE/EHWErF9ujKHA/Ydx8L//xAAdEQABBAIDAAAA"
        "AAAAAAAAAAAhAAERQTHRUWFx/9oACAECAQE/EHY0poYE2EUKY6TMW11kIUQJ8650v//EAB8QAQACAgIDAQEAAAAAAAAAAAEAESFB"
        "MVFhccHh8P/aAAgBAQABPxCxMQ06KYs3qC8BRS93+XD4HHc2pGOAo28dH94h6V5nWj7GikAt0Z33KVClYfcN+bIaliGwgK8X9mVs"
        "VV7cz//Z",
    ),
    "CMYK": (
        "cb6185ef261c90b39718637edc4653fa",
        "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAbEhQXFBEbFxYXHhwbIChCKyglJShROj0wQmBVZWRfVV1baniZgWpxkHNbXYW1hpCeo6ut"
        "q2eAvMm6pseZqKuk/8AAFAgAFQAbBEMRAE0RAFkRAEsRAP/EABoAAAICAwAAAAAAAAAAAAAAAAAFAwQBAgb/xAAtEAACAQMCAwcE"
        "AwEAAAAAAAABAgMABBEhMQUSYRMUIkFRgZEkcaGxMsHC8P/aAA4EQwBNAFkASwAAPwBJbLtSqC18W1JLS17bGldNTa2XancAFnZy"
        "3BxlFyuQSC3kPnFNF4RDHF2s7LGnq3n0HqelFNbZdqqW6934TKRy8zgRgN550OOuMn2rK2dm2RBbSTsMYOOVT7nX8UUwVfCKa2lr"
        "9NHp5Vt3eyUlXtoFYHBBuQCD8UVxNsu1VILXxbVpwZY47czy/wAEXJ69PvRTa2Xao+MOrPDZIASp7Rz6HYD8n8VMi831l545X0jj"
        "Gmeg9AP+yTqU1tl2ougPpbQYyT2jaHI8h/r4raQMWK3GXPKC0KNyxqBr4v35+wxRSzivHrux4hLbRRwlExgspzqAfXrVO/ubk3ko"
        "guJ441PKFDkAEaHQH1BrAjDai6SPy5UgJUfY4OfmillsNqe30vcbGW5RAzIBgHbJIH91DZqTwmJQcCSVVbTcYJ/YFFNbYbUj4avb"
        "TmWQ5d2LMcbk1M8zJK8uFLiXu8ZxogGdep0Pz7UU1thtTHl5+OMrHIjCqumwwD+yay8Qt1njGDFEExHjAYnGp8zqdug+9FcRcS94"
        "uJZ+Xl7Ry+M5xk5qjCvbRiWQ5d8sxxuSar3V8bacwsZnKhfEs3IDoDsBgUV//9k=",
    ),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_have_the_pixels_that_caches_were_filled_with(kind: str) -> None:
    """On every processor, by whichever library decodes."""
    expected, data = JPEGS[kind]
    image = decode(base64.b64decode(data))
    assert image.shape == (3, 21, 27)
    assert hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).hexdigest() == expected


def test_jpegs_have_the_pixels_that_torchvision_gives_them(photo: Image.Image) -> None:
    for mode in ("RGB", "L", "CMYK"):
        for options in ({}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}, {"subsampling": 1}):
            data = encoded(photo.convert(mode), "JPEG", **options)
            theirs = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            assert torch.equal(decode(data), theirs), (mode, options)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 9), (37, 53)])
def test_interlaced_pngs(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    rows = b""
    for top, left, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        part = image[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    assert np.array_equal(pixels_of(png(rows, *shape, interlaced=1)), image)


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def big_tiff(values: NDArray[np.uint16], white_is_zero: bool = False) -> bytes:
    return encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0} if white_is_zero else {})


def rgb16_ppm(values: NDArray[np.uint16]) -> bytes:
    return b"P6 256 256 65535\n" + np.stack([values] * 3, 2).astype(">u2").tobytes()


def rgb16_png(values: NDArray[np.uint16]) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in np.stack([values] * 3, 2).astype(">u2"))
    return png(rows, 256, 256, bits=16, color=2)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(RAMP), "PNG"),
        pgm(RAMP),
        big_tiff(RAMP),
        rgb16_ppm(RAMP),
        rgb16_png(RAMP),
    ],
    ids=["png", "pgm", "tiff", "ppm rgb", "png rgb"],
)
def test_sixteen_bits_keep_their_256_gray_levels(data: bytes) -> None:
    got = pixels_of(data)
    assert got.shape == (256, 256, 3) and len(np.unique(got)) == 256
    exact = RAMP.astype(float)[..., None] / 257  # 65535 / 255
    assert np.abs(got - exact).max() <= 1, "rounded either way"
    assert got[0, 0, 0] == 0 and got[-1, -1, 0] == 255


def test_tiffs_of_16_bits_whose_zero_is_white() -> None:
    assert np.array_equal(pixels_of(big_tiff(RAMP, white_is_zero=True)), 255 - pixels_of(big_tiff(RAMP)))


def test_modes_become_rgb(photo: Image.Image) -> None:
    """One color in each mode, and what it must be."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    alpha = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    cases = [
        (encoded(red.convert("P"), "PNG"), (255, 0, 0)),
        (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("1", (8, 8), 1), "TIFF"), (255, 255, 255)),
        (encoded(Image.new("L", (8, 8), 77), "BMP"), (77, 77, 77)),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (encoded(alpha, "PNG"), (255, 0, 0)),  # transparency is dropped
        (encoded(Image.new("LA", (8, 8), (77, 0)), "PNG"), (77, 77, 77)),
        (encoded(alpha, "TIFF"), (255, 0, 0)),
    ]
    for data, color in cases:
        assert np.abs(pixels_of(data).astype(int) - np.array(color)).max() <= 3, (color, pixels_of(data)[0, 0])


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("F", (8, 8), 0.5), "TIFF"),
        (Image.new("I", (8, 8), 70_000), "TIFF"),
        (Image.new("RGB", (8, 8)), "EPS"),  # Pillow would run ghostscript
        (Image.new("RGB", (8, 8)), "TGA"),
    ],
    ids=["float", "32 bit", "eps", "tga"],
)
def test_pixels_without_a_known_meaning_are_refused(image: Image.Image, kind: str) -> None:
    with pytest.raises(ValueError, match=r"range is not known|known format"):
        decode(encoded(image, kind))


def test_large_text_and_profiles_in_a_png_change_nothing(photo: Image.Image) -> None:
    plain = encoded(photo, "PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20))) + chunk(
        b"iCCP", b"a\0\0" + zlib.compress(bytes(9 << 20))
    )
    for at in (33, len(plain) - 12):  # before and behind the pixels
        data = plain[:at] + text + plain[at:]
        assert torch.equal(decode(data), decode(plain)) and image_size(io.BytesIO(data)) == (67, 91)


# ---- files that are none


def damaged_pngs() -> dict[str, bytes]:
    rows = (b"\0" + bytes(range(192))) * 64
    good = png(rows, 64, 64)
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    return {
        "a wrong checksum": good.replace(chunk(b"IEND", b""), chunk(b"IDAT", b"", 1) + chunk(b"IEND", b"")),
        "too few rows": png(rows[: 20 * 193], 64, 64),
        "too many rows": png(rows + rows, 64, 64),
        "a filter that is none": png(rows[: 20 * 193] + b"\x09" + rows[20 * 193 + 1 :], 64, 64),
        "a flipped bit": bytes(flipped),
        "cut": good[:-200],
        "nothing but its name": b"\x89PNG\r\n\x1a\n",
        "no pixels": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b""),
    }


def test_damaged_pngs_are_named_by_reason() -> None:
    for name, data in damaged_pngs().items():
        with pytest.raises(ValueError, match=r"\w") as caught:
            decode(data)
        assert "\n" not in str(caught.value), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_no_file_of_2000_damaged_ones_ends_the_process(photo: Image.Image) -> None:
    """Bytes changed and cut off at random, most of them in headers: an image or a ValueError of one line."""
    small = photo.resize((40, 30))
    kinds: list[bytes] = [encoded(small, kind) for kind in ("PNG", "GIF", "JPEG", "TIFF", "BMP", "PPM", "WEBP")]
    kinds += [
        encoded(small, "JPEG", progressive=True),
        encoded(small.convert("P"), "PNG"),
        *damaged_pngs().values(),
    ]
    kinds += [encoded(small, "TIFF", compression=each) for each in ("tiff_lzw", "jpeg", "tiff_deflate")]
    rng, refused = random.Random(0), 0
    for number in range(2000):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(rng.choice((1, 1, 3, 10))):
            data[rng.randrange(min(len(data), rng.choice((64, len(data)))))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        try:
            assert decode(bytes(data)).dtype == torch.uint8
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 500 < refused < 2000


def bomb_png(side: int) -> bytes:
    """Black, `side` squared, a thousandth of its pixels' bytes."""
    rows = zlib.compressobj(9)
    row = bytes(1 + side * 3)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = b"".join(rows.compress(row) for _ in range(64)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    inside = png((b"\0" + bytes(30)) * 10, 10, 10)
    return {
        "png of 30,000 squared": bomb_png(30_000),
        "jpeg of 60,000 squared": bytes(jpeg),
        "1 bit": encoded(Image.new("1", (20_000, 10_000)), "PNG"),
        "wider than any format holds": encoded(Image.new("1", (70_000, 1)), "PNG"),
        "a small header and endless rows": inside.replace(
            inside[33:], chunk(b"IDAT", zlib.compress(bytes(1 << 27))) + chunk(b"IEND", b"")
        ),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_bombs_take_neither_memory_nor_time() -> None:
    files = bombs()
    before, start = peak(), time.process_time()
    for name, data in files.items():
        with pytest.raises(ValueError, match=r"make it smaller|more or fewer rows"):
            decode(data)
        if name != "a small header and endless rows":
            with pytest.raises(ValueError, match="make it smaller"):
                image_size(io.BytesIO(data))
    assert peak() - before < 300 and time.process_time() - start < 5


# ---- one answer in index, training and conversion


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:  # bound by a short name: paths of sockets are 108 bytes
            made.bind(f"/proc/self/fd/{place}/{path.name}")
    finally:
        os.close(place)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


UNOPENABLE: dict[str, Callable[[Path], object]] = {
    "fifo.png": fifo,
    "device.png": device,
    "socket.png": a_socket,
    "nowhere.png": lambda path: path.symlink_to("nowhere"),
    "itself.png": lambda path: path.symlink_to(path.name),
    "bomb.png": write(bombs()["1 bit"]),
    "text.png": write(b"<html>404 not found</html>"),
    "empty.png": write(b""),
    "sparse.png": sparse,
}


@pytest.fixture
def tree(tmp_path: Path, photo: Image.Image) -> Path:
    """Two classes of six images, one of them with everything that cannot be opened."""
    root = tmp_path / "tree"
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.resize((32, 32)).save(path)
    for name, make in UNOPENABLE.items():
        make(root / "b" / name)
    return root


def test_an_index_names_all_that_cannot_be_opened_at_once(tree: Path) -> None:
    with pytest.raises(ValueError, match="not readable images; repair or remove them") as caught:
        index_image_folder(tree)
    assert "b/bomb.png: 10000x20000 pixels" in str(caught.value) and "and 4 more" in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_skip_and_report_shows_them_black(tree: Path, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    for name, data in damaged_pngs().items():
        (tree / "a" / f"damaged {name}.png").write_bytes(data)
    options = LoaderOptions(workers=1, on_decode_error="skip_and_report")
    with open_loader(backend, tree, options) as loader:
        index = loader.index
        unreadable = {
            name for name, size in zip(index.names, index.sizes.tolist(), strict=True) if tuple(size) == UNREADABLE
        }
        assert unreadable == {f"b/{name}" for name in UNOPENABLE} | {"a/damaged nothing but its name.png"}
        ids = np.arange(len(index))
        plan = EpochPlan(index=index, family=Center(), view_seed=0, view=0, order=ids, batch_size=8)
        black = set()
        for batch in loader.epoch(plan.for_rank((24,))):
            for image, sample in zip(batch.images[0], batch.ids.tolist(), strict=True):
                if not image.any():
                    black.add(index.names[sample])
        named = {error.name for error in loader.undecodable.values()}
    assert black == named == unreadable | {f"a/damaged {name}.png" for name in damaged_pngs()}


def test_conversion_rejects_the_same_files(tree: Path, tmp_path: Path) -> None:
    ran = run_program("tools/convert.py", "resident", tree, tmp_path / "out", "--workers", 0)
    assert ran.code == 0 and "12 images" in ran.out, ran
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    for name in UNOPENABLE:
        assert f",b/{name}," in rejects, (name, rejects)
