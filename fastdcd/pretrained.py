"""Published weights, fetched once and only on the explicit words `pretrained` and `hub:OWNER/NAME`."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.files import file_sha256

# Seconds without a byte before a download counts as failed.
TIMEOUT = 30.0


@dataclass(frozen=True)
class _Hub:
    """A file of the Hugging Face Hub; `file` is None for the usual names."""

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class _Url:
    """A file by its address. The hash at the end of its name, as torch.hub has it, is checked."""

    url: str

    def __str__(self) -> str:
        return self.url


def is_published(checkpoint: Path) -> bool:
    """Whether a checkpoint of a config is a word for published weights instead of a file."""
    return str(checkpoint) == "pretrained" or str(checkpoint).startswith("hub:")


def fetch(model: str, checkpoint: Path, key: str, say: Callable[[str], object]) -> Path:
    """The file of published weights, from the network where it is not there yet.

    Files lie where the libraries keep theirs: the Hugging Face cache (HF_HOME), torch.hub's folder (TORCH_HOME).
    What arrived is compared with the published hash, each time it is used.

    Args:
        model: torchvision:NAME or timm:NAME.
        checkpoint: `pretrained`: the weights that the library itself would load; `hub:OWNER/NAME[@REVISION][:FILE]`: a
            repository of the Hugging Face Hub.
        key: teacher.checkpoint or student.checkpoint, for messages.
        say: called with one line that names the source and the file.

    Raises ValueError if there are no such weights, they cannot be fetched, or they are damaged.
    """
    source = _hub(str(checkpoint), key) if str(checkpoint) != "pretrained" else _of_library(model, key)
    try:
        with _timeout():
            path = _from_hub(source) if isinstance(source, _Hub) else _from_url(source)
    except Exception as error:  # requests', urllib's, the hub's own: whatever a network makes of a download
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{key}: cannot fetch {source} ({type(error).__name__}: {lines[0][:200]}); where there is a network: "
            f"{_by_hand(source)}; then set {key} to that file"
        ) from error
    expected, found = _published_hash(path, source), file_sha256(path)
    if not found.startswith(expected):
        raise ValueError(
            f"{path}: not as it was published (SHA-256 {found[:16]}..., expected {expected[:16]}...); remove it and start "
            "again"
        )
    say(f"{key}: {source} is in {path}")
    return path


def check_published(model: str, key: str) -> None:
    """Raises ValueError if neither timm nor torchvision publishes weights for a model; fetches nothing."""
    _of_library(model, key)


def input_size(model: str) -> int:
    """The image size that a model's published weights were trained at, pixels."""
    library, _, name = model.partition(":")
    if library == "timm":
        import timm

        return int(timm.get_pretrained_cfg(name).input_size[-1])
    return 224


def _of_library(model: str, key: str) -> _Hub | _Url:
    library, _, name = model.partition(":")
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
        if settings and settings.hf_hub_id:
            repository, _, revision = settings.hf_hub_id.partition("@")
            return _Hub(repository, revision or None, settings.hf_hub_filename)
        if settings and settings.url:
            return _Url(settings.url)
        raise ValueError(f"{key}: got pretrained, but timm has no weights for {name}; name a file of weights")
    if library == "torchvision":
        from torchvision import models

        if name in models.list_models(module=models):
            return _Url(models.get_model_weights(name).DEFAULT.url)
        raise ValueError(f"{key}: got pretrained, but torchvision has no {name}")
    raise ValueError(
        f"{key}: got pretrained, but {model} has no published weights (only timm:NAME and torchvision:NAME have); "
        "name a file of weights"
    )


def _hub(text: str, key: str) -> _Hub:
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?", text)
    if not found:
        raise ValueError(
            f"{key}: got {text!r}, expected hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME:FILE"
        )
    return _Hub(*found.groups())


def _from_hub(source: _Hub) -> Path:
    from huggingface_hub import hf_hub_download  # timm's own dependency
    from huggingface_hub.errors import EntryNotFoundError

    names = [source.file] if source.file else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        try:
            return Path(hf_hub_download(source.repository, name, revision=source.revision))
        except EntryNotFoundError:
            if name == names[-1]:
                raise
    raise AssertionError


def _from_url(source: _Url) -> Path:
    import torch.hub

    path = _folder() / source.url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            source.url, str(path), hash_prefix=_hash_in_name(path) or None, progress=sys.stderr.isatty()
        )
    return path


def _folder() -> Path:
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def _published_hash(path: Path, source: _Hub | _Url) -> str:
    """The hash that a file should have, or its beginning; empty if none is published."""
    if isinstance(source, _Url):
        return _hash_in_name(path)
    name = path.resolve().name  # the hub's cache names what it keeps by its hash: SHA-256 for large files
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _hash_in_name(path: Path) -> str:
    found = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    return found[1] if found else ""


def _by_hand(source: _Hub | _Url) -> str:
    if isinstance(source, _Url):
        return f"curl -L -O {source.url}"
    revision = f" --revision {source.revision}" if source.revision else ""
    return f"hf download {source.repository} {source.file or 'model.safetensors'}{revision} --local-dir weights"


@contextmanager
def _timeout() -> Iterator[None]:
    """urllib has no timeout by default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
