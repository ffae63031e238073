"""What a teacher cache holds: its manifest, and how a row of features becomes bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from pipelines.formats.checked import Record

FORMAT = "fastdcd-cache-1"
ENVIRONMENT = "environment."  # begins the names of what of the machine, not of the config, decides features
PIXELS = "loader.pixels"  # of a fingerprint: a digest of the stored pixels, where they were summed
BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a row of features becomes bytes.

    Attributes:
        row_bytes: bytes of a row of d features.
        encode: float32 [n, d] -> uint8 [n, row_bytes].
        decode: uint8 [n, row_bytes] -> float32 [n, d]; runs on any device.
        cosine: least cosine between a stored row and the same row recomputed.
        finite: uint8 [n, row_bytes] -> bool [n]: whether a row is of finite features.
    """

    row_bytes: Callable[[int], int]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    cosine: float
    finite: Callable[[Tensor], Tensor]


def _plain(dtype: torch.dtype, cosine: float) -> Codec:
    return Codec(
        row_bytes=lambda dim: dim * dtype.itemsize,
        encode=lambda features: features.to(dtype).contiguous().view(torch.uint8),
        decode=lambda rows: rows.view(dtype).float(),
        cosine=cosine,
        finite=lambda rows: rows.view(dtype).isfinite().all(1),
    )


def _encode_uint8(features: Tensor) -> Tensor:
    """Each row as codes 0..255 between its own least and greatest value, then those two as float32."""
    low, high = features.aminmax(dim=1, keepdim=True)  # [n, 1]
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((features - low) / step).round_().to(torch.uint8)
    return torch.cat([codes, torch.cat([low, step], 1).contiguous().view(torch.uint8)], 1)


def _finite_uint8(rows: Tensor) -> Tensor:
    return _low_and_step(rows).isfinite().all(1)


def _low_and_step(rows: Tensor) -> Tensor:
    """The two float32 at the end of each row, [n, 2]. A copy: a view of bytes may begin where no float can."""
    return rows[:, -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def _decode_uint8(rows: Tensor) -> Tensor:
    low, step = _low_and_step(rows).split(1, dim=1)  # [n, 1] each
    return rows[:, :-8] * step + low


CODECS: dict[str, Codec] = {
    "fp32": _plain(torch.float32, 0.99999),
    "fp16": _plain(torch.float16, 0.9999),
    "bf16": _plain(torch.bfloat16, 0.999),
    "uint8": Codec(
        row_bytes=lambda dim: dim + 8,
        encode=_encode_uint8,
        decode=_decode_uint8,
        cosine=0.999,
        finite=_finite_uint8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache holds."""

    rows: int
    dim: int
    views: int
    dtype: str
    fingerprint: Mapping[str, str]

    @property
    def codec(self) -> Codec:
        return CODECS[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.codec.row_bytes(self.dim)

    @property
    def view_bytes(self) -> int:
        """Bytes of one view on disk, done marks and checksums included."""
        return self.rows * (self.row_bytes + 1) + 4 * -(-self.rows // BLOCK_ROWS)


def different_environment(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name and both values of what differs between the environments in two fingerprints, as far as both know it."""
    return [
        (name.removeprefix(ENVIRONMENT), stored[name], value)
        for name, value in wanted.items()
        if name.startswith(ENVIRONMENT) and stored.get(name, value) != value
    ]


class StoredManifest(Record):
    """manifest.json."""

    format: str
    classifier: str  # digest of classifier.safetensors
    rows: NonNegativeInt
    dim: PositiveInt
    views: PositiveInt
    dtype: str
    fingerprint: dict[str, str]


class CacheMismatch(ValueError):
    """A cache is of something else: another teacher, dataset, view family, seed or backend."""
