"""Published weights, fetched from servers on this machine that speak the Hub's and torch.hub's language."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import Digits, run_program
from safetensors.torch import save
from torch.hub import get_dir, set_dir

from fastdcd import models, pretrained, weights

NAME = "timm:test_resnet"  # 0.5 million parameters
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes) and counts what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.promised: dict[str, str] = {}  # a hash that is not the content's
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.server.files.get(self.path)
        self.server.asked.append(f"{self.command} {self.path}")
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        digest = self.server.promised.get(self.path, hashlib.sha256(content).hexdigest())
        self.send_response(200)
        for name, value in {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that the Hub's client and torch.hub are pointed at, with caches of their own."""
    import huggingface_hub.constants as hub

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "ENDPOINT", server.url)
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = get_dir()
    set_dir(str(tmp_path / "torch"))
    yield server
    set_dir(before)
    server.shutdown()
    server.server_close()


def published(name: str, classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    library, _, inner = name.partition(":")
    network = timm.create_model(inner, num_classes=classes) if library == "timm" else None
    return (network or torchvision.models.get_model(inner, num_classes=classes)).state_dict()


def test_timms_weights_come_from_the_hub_once(server: Server) -> None:
    tensors = published(NAME, 1000)
    path = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    server.files[path] = save(tensors)
    said: list[str] = []
    files = [pretrained.fetch(NAME, Path("pretrained"), "teacher.checkpoint", said.append) for _ in range(2)]
    assert server.asked.count(f"GET {path}") == 1 and files[0] == files[1]
    assert said[0] == f"teacher.checkpoint: timm/test_resnet.r160_in1k is in {files[0]}"
    model = models.build(NAME, classes=1000)
    weights.load_into(model, files[0], what="teacher")
    assert weights.digest(model.original_state_dict()) == weights.digest(tensors)


def test_torchvisions_weights_come_from_their_address_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = published("torchvision:shufflenet_v2_x0_5", 1000)
    file = Path(get_dir()).parent / "x.pth"
    torch.save(tensors, file)
    content = file.read_bytes()
    name = f"/shufflenet-{hashlib.sha256(content).hexdigest()[:10]}.pth"
    server.files[name] = content
    enum = torchvision.models.get_model_weights("shufflenet_v2_x0_5")
    monkeypatch.setattr(enum.DEFAULT.value, "url", server.url + name)
    for _ in range(2):
        path = pretrained.fetch("torchvision:shufflenet_v2_x0_5", Path("pretrained"), "teacher.checkpoint", str)
    assert server.asked == [f"GET {name}"] and path.read_bytes() == content
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="not as it was published"):
        pretrained.fetch("torchvision:shufflenet_v2_x0_5", Path("pretrained"), "teacher.checkpoint", str)
    path.unlink()
    server.files[name] = content[:-1] + b"x"
    with pytest.raises(ValueError, match=r"invalid hash value.*curl -L -O"):
        pretrained.fetch("torchvision:shufflenet_v2_x0_5", Path("pretrained"), "teacher.checkpoint", str)
    assert not path.exists()


def test_a_repository_of_the_hub_by_its_name(server: Server) -> None:
    server.files["/me/net/resolve/v2/pytorch_model.bin"] = b"second name"
    server.files["/me/net/resolve/main/weights/best.pth"] = b"named"
    for word, content in (("hub:me/net@v2", b"second name"), ("hub:me/net:weights/best.pth", b"named")):
        assert pretrained.fetch("cifar:resnet8", Path(word), "teacher.checkpoint", str).read_bytes() == content


def test_a_file_of_the_hub_that_is_not_as_published_is_refused(server: Server) -> None:
    server.files["/me/net/resolve/main/model.safetensors"] = b"weights"
    path = pretrained.fetch("cifar:resnet8", Path("hub:me/net"), "teacher.checkpoint", str)
    path.resolve().write_bytes(b"WEIGHTS")
    with pytest.raises(ValueError, match=r"not as it was published .* remove it"):
        pretrained.fetch("cifar:resnet8", Path("hub:me/net"), "teacher.checkpoint", str)


@pytest.mark.parametrize(
    ("model", "word", "says"),
    [
        ("cifar:resnet8", "pretrained", "cifar:resnet8 has no published weights"),
        ("timm:no_such_net", "pretrained", "timm has no weights for no_such_net"),
        ("torchvision:no_such_net", "pretrained", "torchvision has no no_such_net"),
        ("cifar:resnet8", "hub:me", "expected hub:OWNER/NAME"),
        (NAME, "pretrained", "hf download timm/test_resnet.r160_in1k model.safetensors --local-dir weights"),
        (
            "cifar:resnet8",
            "hub:me/net@v1",
            "hf download me/net model.safetensors --revision v1 --local-dir weights",
        ),
    ],
)
def test_what_cannot_be_fetched_says_how_by_hand(server: Server, model: str, word: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        pretrained.fetch(model, Path(word), "teacher.checkpoint", str)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_pretrained_teacher_in_one_word(digits: Digits, tmp_path: Path, server: Server) -> None:
    """Features of a network that was trained on other classes; without a network nothing was changed."""
    teacher = {"mode": "online", "model": NAME, "checkpoint": "pretrained", "classifier": False, "image_size": 32}
    file = digits.file(tmp_path / "x.yaml", teacher=teacher, loss={"dcd": 1.0}, train={"epochs": 1})
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "hf download" in ran.err
    assert not (tmp_path / "run").exists()
    server.files["/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"] = save(published(NAME, 1000))
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 0 and "timm/test_resnet.r160_in1k is in" in ran.out, ran.err
    ran = run_program("fastdcd/train.py", "--config", file, "--set", "teacher.classifier=true", "run.dir=other")
    assert ran.code == 2 and "the checkpoint has 1000 classes, the dataset has 10" in ran.err
    assert "teacher.classifier=false" in ran.err and "data.classes" in ran.err
