"""Fixtures shared by all tests: real data, and small runs of the real programs."""

import contextlib
import importlib
import io
import json
import logging
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from fastdcd import config, config_file
from fastdcd.train import train

ROOT = Path(__file__).resolve().parents[1]
# torch's compiler keeps code in a folder of the machine, and takes what another instruction set was made for
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{os.getuid()}-{capability}"
    )
# Real data for the tests, with imagenet-sample/ in it. Not needed: parts of scikit-learn's photographs do as well.
DATA = Path(os.environ.get("FASTDCD_TEST_DATA", ROOT.parent / "shared" / "data"))


def absent(reason: str) -> None:
    """Skip on a user's machine; fail in CI, where everything must be tested."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def needed(module: str) -> Any:
    """A module of an optional package; without it the test is skipped, and fails in CI."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent(f"{error}")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """60 real JPEGs: ImageNet's if FASTDCD_TEST_DATA has them, else parts of scikit-learn's two photographs."""
    found = sorted((DATA / "imagenet-sample" / "train").glob("*/*"))[:60]
    return found or cut_photographs(tmp_path_factory.mktemp("photographs"))


def cut_photographs(folder: Path) -> list[Path]:
    """Parts of all shapes and JPEGs of several qualities and chroma subsamplings; one in gray."""
    images = load_sample_images().images
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = images[number % len(images)]
        height, width = rng.integers(120, (pixels.shape[0], pixels.shape[1]))
        top, left = rng.integers(0, (pixels.shape[0] - height + 1, pixels.shape[1] - width + 1))
        image = Image.fromarray(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        image = image.convert("L") if number == 7 else image
        options: dict[str, Any] = {} if number == 7 else {"subsampling": number % 3}
        image.save(folder / f"{number:02d}.JPEG", quality=75 + number % 4 * 6, **options)
    return sorted(folder.iterdir())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are for machines with a GPU, and wait for one elsewhere, in CI too."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Each test begins without Accelerate's settings of the last."""
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    """Accelerate keeps its settings for the life of a process: another precision needs a new start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True, scope="session")
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of image folders go to a folder of this session, not to the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    code: int
    out: str
    err: str


def run_program(path: str, *arguments: object) -> Ran:
    """Run a program of the checkout by its path, in this process: importing torch takes seconds."""
    argv, search, handlers = sys.argv, list(sys.path), list(logging.getLogger().handlers)
    sys.argv = [str(ROOT / path), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = argv, search
        logging.getLogger().handlers[:] = handlers
    return Ran(code=code or 0, out=out.getvalue(), err=err.getvalue())


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits as a user would have them.

    folder: class folders of PNG files, train/ and val/. resident: the same, converted. teacher: weights of
    cifar:resnet8 after a short training.
    """

    folder: Path
    resident: Path
    teacher: Path

    def tree(self, **sections: Any) -> dict[str, Any]:
        """A small config as a nested dictionary, sections overridden."""
        tree: dict[str, dict[str, Any]] = {
            "data": {
                "train": str(self.resident / "train"),
                "val": str(self.resident / "val"),
                "backend": "resident",
                "batch_size": 64,
                "device": "cpu",
            },
            "views": {"family": "pad_crop", "padding": 1, "flip": 0.5},
            "student": {"model": f"{ROOT}/configs/digits/tiny.py:tiny", "image_size": 8},
            "teacher": {"model": "cifar:resnet8", "checkpoint": str(self.teacher), "evaluate": False},
            "optim": {"lr": 0.1},
            "schedule": {"name": "one_cycle", "warmup": 1},
            "train": {"epochs": 3, "log_every": 1},
            "eval": {"crop_ratio": 1.0},
            "run": {"trackers": []},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return tree

    def config(self, run: Path, /, **sections: Any) -> config.Config:
        """The same, parsed, writing to `run`."""
        sections["run"] = {"dir": str(run), **sections.get("run", {})}
        return config_file.parse(self.tree(**sections), "test")

    def file(self, path: Path, /, **sections: Any) -> Path:
        """The same as a YAML file, its run beside it."""
        sections["run"] = {"dir": str(path.parent / "run"), **sections.get("run", {})}
        path.write_text(yaml.safe_dump(self.tree(**sections)))
        return path


# Distillation with everything switched on; teacher.mode is for the test to choose.
BOTH = {"kd": 1.0, "dcd": 1.0}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        if number >= 700:
            break
        path = root / "images" / ("train" if number < 500 else "val") / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels / 16 * 255).astype(np.uint8)).save(path)
    for part in ("train", "val"):
        ran = run_program("tools/convert.py", "resident", root / "images" / part, root / "resident" / part)
        assert ran.code == 0, ran.err
    made = Digits(root / "images", root / "resident", root / "teacher" / "student.safetensors")
    torch.manual_seed(0)
    train(made.config(root / "teacher", student={"model": "cifar:resnet8"}, teacher={"mode": "none"}))
    forget_accelerate()
    return made


def metric_lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind (train, eval, epoch) in a run's metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@dataclass(frozen=True)
class ObjectStore:
    """A server on this machine that speaks S3, with one empty bucket."""

    url: str
    bucket: str
    client: Any

    def upload(self, folder: Path, prefix: str) -> None:
        """Put the files of a folder there, as anybody's tool would."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [each["Key"] for each in found]


SECRET = "a-secret-that-no-message-may-hold"


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """The address of moto's server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = needed("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def object_store(object_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A bucket of its own, and an environment whose AWS credentials are good for it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = needed("boto3").client("s3")
    bucket = f"bucket-{time.monotonic_ns()}"
    client.create_bucket(Bucket=bucket)
    yield ObjectStore(object_server, bucket, client)
