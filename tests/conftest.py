"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def absent(reason: str) -> None:
    """Skip on a user's machine; fail in CI, where everything must be tested."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data beside the checkout (CIFAR-100, ImageNet photographs)."""
    if not SHARED.is_dir():
        absent(f"no real data at {SHARED}: this test needs it")
    return SHARED
