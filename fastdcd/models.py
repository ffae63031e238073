"""Networks by name, opened up into pooled features and final classifier without code for each of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdcd import model_file, shipped, weights
from fastdcd.model_file import near
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
    """A network cut before its final linear layer, or one that has none.

    The layer is timm's `get_classifier()`, or the last nn.Linear with `classes` outputs. It is replaced by
    nn.Identity inside the network, so that the network returns pooled features.

    Attributes:
        network: the network without its classifier; images [n, 3, H, W] -> features [n, feature_dim].
        classifier: the final layer; with no outputs if there is none.
        classifier_name: its name in the whole network, or "".
        feature_dim, classes: its inputs and outputs.
        left_out: modules of the network as its library knows it that were left out on purpose.
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
        self.left_out: tuple[str, ...] = ()

    @classmethod
    def without_classifier(cls, network: nn.Module, feature_dim: int, left_out: Sequence[str]) -> FeatureModel:
        """A network that returns pooled features [n, feature_dim] by itself. Its logits are [n, 0]."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.network, model.classifier = network, no_outputs(feature_dim)
        model.classifier_name, model._order = "", list(network.state_dict())
        model.feature_dim, model.classes, model.left_out = feature_dim, 0, tuple(left_out)
        return model

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

    def is_classifier(self, name: str) -> bool:
        """Whether a tensor of `original_state_dict` belongs to the classifier."""
        return bool(self.classes) and name.startswith(f"{self.classifier_name}.")

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
        final = {k.removeprefix(prefix): v for k, v in tensors.items() if self.is_classifier(k)}
        if self.classes:
            self.classifier.load_state_dict(final)
        self.network.load_state_dict({k: v for k, v in tensors.items() if not self.is_classifier(k)})


def no_outputs(dim: int) -> nn.Linear:
    """A linear layer of `dim` inputs and no outputs, without torch's warning that there is nothing to initialise."""
    layer = nn.Linear(dim, 1, device="meta")
    layer.out_features = 0
    layer.weight, layer.bias = nn.Parameter(torch.empty(0, dim)), nn.Parameter(torch.empty(0))
    return layer


def _classifier_name(network: nn.Module, classes: int) -> str:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    if hasattr(network, "get_classifier"):  # timm's convention
        classifier = network.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, tuple):
            raise ValueError(
                f"{type(network).__name__}: ends in {len(classifier)} classifiers, expected one; take its form "
                "without distillation token, as a teacher its features alone (teacher.classifier=false), or wrap it "
                "(path/to/file.py:callable)"
            )
        layers = {name: m for name, m in layers.items() if m is classifier} or layers
    final = [name for name, m in layers.items() if m.out_features == classes]
    if final == [""]:
        raise ValueError("the network is one nn.Linear and nothing else; put it into an nn.Sequential")
    if not final:
        raise ValueError(
            f"{type(network).__name__}: no final nn.Linear with {classes} outputs in it; only classifiers that end in "
            "one can be taught, or teach more than their features (teacher.classifier=false)"
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


class _Library(NamedTuple):
    """How networks of a library are built.

    Attributes:
        classifier: (name, classes, sizes) -> a network that ends in a classifier.
        features: (name, sizes) -> a network, the classes it was built with (0: it returns pooled features), and
            the modules that were left out.
    """

    classifier: Callable[[str, int, Sequence[int]], nn.Module]
    features: Callable[[str, Sequence[int]], tuple[nn.Module, int, Sequence[str]]]


def _torchvision(name: str, classes: int, sizes: Sequence[int] = ()) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown("torchvision", name, models.list_models(module=models))
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int, sizes: Sequence[int] = ()) -> nn.Module:
    import timm

    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown("timm", name, timm.list_models())
    tagged = timm.list_pretrained(f"{architecture}.*")
    if dot and name not in tagged:
        raise _unknown("timm", name, tagged)
    settings = timm.get_pretrained_cfg(name)
    if settings and settings.fixed_input_size and any(size != settings.input_size[-1] for size in sizes):
        # the weights stay those of the usual size: a position embedding is resized at each forward pass (ViT), or
        # windows are padded (Swin)
        for option in ({"dynamic_img_size": True}, {"strict_img_size": False}):
            with contextlib.suppress(TypeError):  # an option that this architecture does not have
                return timm.create_model(name, pretrained=False, num_classes=classes, **option)
    return timm.create_model(name, pretrained=False, num_classes=classes)


def _timm_features(name: str, sizes: Sequence[int]) -> tuple[nn.Module, int, Sequence[str]]:
    import timm

    network = _timm(name, 0, sizes)
    settings = timm.get_pretrained_cfg(name)
    classifier = (settings.classifier if settings else None) or ()
    return network, 0, (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _cifar(name: str, classes: int, sizes: Sequence[int] = ()) -> nn.Module:
    from fastdcd import cifar

    return cifar.build(name, classes)


def _cut(build: Callable[[str, int], nn.Module], classes: int) -> Callable[..., Any]:
    return lambda name, sizes: (build(name, classes), classes, ())


LIBRARIES: dict[str, _Library] = {
    "torchvision": _Library(_torchvision, _cut(_torchvision, 1000)),
    "timm": _Library(_timm, _timm_features),
    "cifar": _Library(_cifar, _cut(_cifar, 100)),
}


def build(name: str, *, classes: int, sizes: Sequence[int] = ()) -> FeatureModel:
    """A network with fresh weights.

    Args:
        name: torchvision:NAME, timm:NAME, cifar:NAME, or path/to/file.py:callable, which is called with
            num_classes=classes if it takes that, and returns an nn.Module.
        classes: outputs of its classifier; 0 for pooled features alone. A function of a file then returns a network
            that gives them.
        sizes: heights and widths of the images it will see, for networks that are made for one. Whether it takes
            them is for `check_sizes` to find out.

    Raises ValueError for an unknown name (with the nearest one), a file that cannot be imported, or a network
    without a final linear layer.
    """
    library, colon, inner = name.partition(":")
    path, last_colon, function = name.rpartition(":")
    left_out: Sequence[str] = ()
    if colon and library in LIBRARIES:
        if classes:
            return FeatureModel(LIBRARIES[library].classifier(inner, classes, sizes), classes)
        network, built_with, left_out = LIBRARIES[library].features(inner, sizes)
    elif last_colon and path.endswith(".py"):
        network, built_with = model_file.build(shipped.find(user_path(path)), function, classes), classes
    else:
        raise ValueError(
            f"model: got {name!r}, expected {', '.join(f'{each}:NAME' for each in LIBRARIES)} or "
            "path/to/file.py:callable"
        )
    if classes:
        return FeatureModel(network, classes)
    if built_with:
        model = FeatureModel(network, built_with)
        return FeatureModel.without_classifier(model.network, model.feature_dim, (model.classifier_name,))
    return FeatureModel.without_classifier(network, _feature_dim(network, name, sizes), left_out)


def _feature_dim(network: nn.Module, name: str, sizes: Sequence[int]) -> int:
    """Features of a network without classifier, by looking at a black image. Raises ValueError if they are no row."""
    size = sizes[0] if sizes else 224
    output = _look(network, size, name)
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.shape[1]:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: {name} gives {found} without a classifier, expected pooled features [n, d]")
    return output.shape[1]


def check_sizes(model: FeatureModel, name: str, sizes: Iterable[int], key: str) -> None:
    """Let a network look at one black image of each size. Raises ValueError that names `key` if it cannot."""
    for size in sorted(set(sizes)):
        try:
            _look(model, size, name)
        except ValueError as error:
            raise ValueError(f"{key}: got {size}, but {error}") from None


def check_training(model: FeatureModel, name: str, sizes: Iterable[int]) -> None:
    """Let a copy of a student, which works for evaluation, look at two black images of each size as in training.

    Networks with auxiliary classifiers give another output then, or need larger images. Raises ValueError.
    """
    student = copy.deepcopy(model).train()  # statistics of BatchNorm move
    for size in sorted(set(sizes)):
        try:
            _look(student, size, name, images=2)
        except ValueError as error:
            raise ValueError(
                f"student.model: works for evaluation and not for training: {error}. If it has auxiliary classifiers, give "
                "a function that builds it without: student.model: path/to/file.py:student, and in the file: "
                "def student(num_classes): return torchvision.models.googlenet(num_classes=num_classes, aux_logits=False)"
            ) from None


@torch.no_grad()
def _look(network: nn.Module, size: int, name: str, images: int = 1) -> Any:
    """What a network gives for some black images; for a single one as in evaluation, whatever its mode."""
    training, device = network.training, next((each.device for each in network.parameters()), None)
    try:
        with torch.random.fork_rng(devices=[]):
            return network.train(training and images > 1)(torch.zeros(images, 3, size, size, device=device))
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{name} fails with images of {size} x {size} px: {lines[0]}") from None
    finally:
        network.train(training)


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    return ValueError(f"model: {library} has no {name!r}{near(name, known, prefix=f'{library}:')}")


def trained_classes(name: str, path: Path) -> int:
    """How many classes the weights at `path` of network `name` were trained on.

    Raises ValueError as `build` and `weights.load` do, or if the file lacks the network's final layer.
    """
    model = build(name, classes=2)
    final = model.classifier_name + ".weight"  # its name depends on no number of classes
    tensors = weights.without_prefix(weights.load(path), model.original_state_dict(), path)
    if final not in tensors:
        raise ValueError(f"{path}: not a checkpoint of {name}: no {final} in it{near(final, list(tensors))}")
    return int(tensors[final].shape[0])


# Their published weights were trained on -1..1. torchvision's transforms normalise as for its other networks, and the
# network undoes it inside (transform_input), but only where torchvision itself loads the weights.
_MINUS_ONE_TO_ONE = ("torchvision:googlenet", "torchvision:inception_v3")


def preprocessing(name: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation (0..1 units) that a network's pretrained weights expect, by its name."""
    if name in _MINUS_ONE_TO_ONE:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    library, _, inner = name.partition(":")
    if library == "torchvision":
        from torchvision.models import get_model_weights

        transforms = get_model_weights(inner).DEFAULT.transforms()
        return tuple(transforms.mean), tuple(transforms.std)
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(inner)
        if settings is not None:
            return settings.mean, settings.std
    return (IMAGENET_MEAN, IMAGENET_STD) if library == "timm" else (CIFAR100_MEAN, CIFAR100_STD)


def normalize_for(name: str, mean: Triple | None = None, std: Triple | None = None) -> Normalize:
    """The normalisation of a network by name, unless mean or std are given."""
    default_mean, default_std = preprocessing(name)
    return Normalize(mean or default_mean, std or default_std)
