"""Networks by name, opened up into pooled features and final classifier without code for each of them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdcd import weights
from pipelines.files import user_path

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CIFAR100_MEAN: Triple = (0.5071, 0.4867, 0.4408)
CIFAR100_STD: Triple = (0.2675, 0.2565, 0.2761)


class ModelOutput(NamedTuple):
    """Pooled features [n, d] before the classifier, and logits [n, classes]."""

    features: Tensor
    logits: Tensor


class FeatureModel(nn.Module):
    """A classification network cut before its final linear layer.

    The layer is timm's `get_classifier()`, or the last nn.Linear with `classes` outputs. It is replaced by
    nn.Identity inside the network, so that the network returns pooled features.

    Attributes:
        network: the network without its classifier; images [n, 3, H, W] -> features [n, feature_dim].
        classifier: the final layer.
        classifier_name: its name in the whole network.
        feature_dim, classes: its inputs and outputs.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        """Raises ValueError if no final linear layer of `classes` outputs is found."""
        super().__init__()
        self.classifier_name = _classifier_name(network, classes)
        self._order = list(network.state_dict())
        classifier = network.get_submodule(self.classifier_name)
        assert isinstance(classifier, nn.Linear)
        network.set_submodule(self.classifier_name, nn.Identity())
        self.network, self.classifier = network, classifier
        self.feature_dim, self.classes = classifier.in_features, classes

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [n, feature_dim] of normalised images [n, 3, H, W]."""
        features = self.network(images)
        if not isinstance(features, Tensor) or features.shape[1:] != (self.feature_dim,):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"the network gives {found} before its classifier, expected [n, {self.feature_dim}]; wrap it in a "
                "function that returns a plain classifier (path/to/file.py:callable)"
            )
        return features

    def forward(self, images: Tensor) -> ModelOutput:
        features = self.features(images)
        return ModelOutput(features, self.classifier(features))

    def original_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the network as its library knows it."""
        tensors = self.network.state_dict()
        tensors.update(
            {f"{self.classifier_name}.{name}": value for name, value in self.classifier.state_dict().items()}
        )
        return {name: tensors[name] for name in self._order}

    def load_original_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `original_state_dict`."""
        prefix = f"{self.classifier_name}."
        self.classifier.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.network.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(prefix)})


def _classifier_name(network: nn.Module, classes: int) -> str:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    if hasattr(network, "get_classifier"):  # timm's convention
        classifier = network.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, tuple):
            raise ValueError(
                f"{type(network).__name__}: ends in {len(classifier)} classifiers, expected one; take its form "
                "without distillation token, or wrap it (path/to/file.py:callable)"
            )
        layers = {name: m for name, m in layers.items() if m is classifier} or layers
    final = [name for name, m in layers.items() if m.out_features == classes]
    if not final:
        raise ValueError(
            f"{type(network).__name__}: no final nn.Linear with {classes} outputs in it; only classifiers that end in "
            "one can teach or be taught"
        )
    return final[-1]


class Normalize(nn.Module):
    """uint8 images [n, 3, H, W] to (x / 255 - mean) / std, float32, strides kept; runs on the images' device."""

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        scale = 1 / (255 * torch.tensor(std)).view(1, 3, 1, 1)
        shift = -(torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)  # type: ignore[arg-type]


# ---- by name


def _torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown("torchvision", name, models.list_models(module=models))
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int) -> nn.Module:
    import timm

    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown("timm", name, timm.list_models())
    tagged = timm.list_pretrained(f"{architecture}.*")
    if dot and name not in tagged:
        raise _unknown("timm", name, tagged)
    return timm.create_model(name, pretrained=False, num_classes=classes)


def _cifar(name: str, classes: int) -> nn.Module:
    from fastdcd import cifar

    return cifar.build(name, classes)


LIBRARIES: dict[str, Callable[[str, int], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "cifar": _cifar,
}


def build(name: str, *, classes: int) -> FeatureModel:
    """A network with fresh weights.

    Args:
        name: torchvision:NAME, timm:NAME, cifar:NAME, or path/to/file.py:callable, which is called with
            num_classes=classes and returns an nn.Module.
        classes: outputs of its classifier.

    Raises ValueError for an unknown name (with the nearest one), a file that cannot be imported, or a network
    without a final linear layer.
    """
    library, colon, inner = name.partition(":")
    if colon and library in LIBRARIES:
        return FeatureModel(LIBRARIES[library](inner, classes), classes)
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return FeatureModel(_from_file(user_path(path), function, classes), classes)
    raise ValueError(
        f"model: got {name!r}, expected {', '.join(f'{each}:NAME' for each in LIBRARIES)} or path/to/file.py:callable"
    )


def _from_file(path: Path, function: str, classes: int) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"model: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"fastdcd_user_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"model: {path} fails on import: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        functions = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise ValueError(f"model: {path} has no function {function!r}{_near(function, functions)}")
    try:
        network = getattr(module, function)(num_classes=classes)
    except Exception as error:
        raise ValueError(
            f"model: {path}:{function}(num_classes={classes}) fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model: {path}:{function} gives {type(network).__name__}, expected a torch.nn.Module")
    return network


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    return ValueError(f"model: {library} has no {name!r}{_near(name, known, prefix=f'{library}:')}")


def _near(name: str, known: list[str], *, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + each for each in near)}?" if near else ""


def trained_classes(name: str, path: Path) -> int:
    """How many classes the weights at `path` of network `name` were trained on.

    Raises ValueError as `build` and `weights.load` do, or if the file lacks the network's final layer.
    """
    final = build(name, classes=2).classifier_name + ".weight"  # its name depends on no number of classes
    tensors = weights.load(path)
    if final not in tensors:
        raise ValueError(f"{path}: not a checkpoint of {name}: no {final} in it{_near(final, list(tensors))}")
    return len(tensors[final])


def preprocessing(name: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation (0..1 units) that a network's pretrained weights expect, by its name."""
    library, _, inner = name.partition(":")
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(inner)
        if settings is not None:
            return settings.mean, settings.std
    return (IMAGENET_MEAN, IMAGENET_STD) if library in ("timm", "torchvision") else (CIFAR100_MEAN, CIFAR100_STD)


def normalize_for(name: str, mean: Triple | None = None, std: Triple | None = None) -> Normalize:
    """The normalisation of a network by name, unless mean or std are given."""
    default_mean, default_std = preprocessing(name)
    return Normalize(mean or default_mean, std or default_std)
