"""Networks by name and by file, cut into pooled features and classifier; and their weight files."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import Digits, run_program
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdcd import models, weights
from fastdcd.train import train

# Parameters in millions, as published with the CIFAR-100 pairs (100 classes).
PUBLISHED = {
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn-16-2": 0.70,
    "wrn-40-1": 0.57,
    "wrn-40-2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "ResNet50": 23.71,
    "MobileNetV2": 0.81,
    "ShuffleNetV1": 0.95,
    "ShuffleNetV2": 1.36,
}
# Features [d] that the literature's losses see.
DIMENSIONS = {
    "resnet20": 64,
    "resnet32x4": 256,
    "wrn-40-2": 128,
    "vgg13": 512,
    "ResNet50": 2048,
    "MobileNetV2": 1280,
}
# Networks built in different ways, each at the smallest size it was made for; none is known to our code.
FOREIGN = {
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:swin_t": 64,
    "timm:resnet18": 64,
    "timm:tf_efficientnet_lite0": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
}


def fresh(name: str, classes: int = 7) -> models.FeatureModel:
    torch.manual_seed(0)
    return models.build(name, classes=classes).eval()


def plain(name: str, classes: int = 7) -> nn.Module:
    """The network from its own library, as someone who does not know fastdcd would build it."""
    library, _, inner = name.partition(":")
    if library == "timm":
        return timm.create_model(inner, num_classes=classes).eval()
    return torchvision.models.get_model(inner, num_classes=classes).eval()


@torch.no_grad()
def check_cut(model: models.FeatureModel, size: int, classes: int) -> Tensor:
    """Shapes of an output, and that pooled features times the classifier are the logits. Returns the logits."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    features, logits = model(images)
    assert features.shape == (2, model.feature_dim) and logits.shape == (2, classes)
    weight, bias = model.classifier.weight, model.classifier.bias
    torch.testing.assert_close(features @ weight.T + bias, logits)
    torch.testing.assert_close(model.features(images), features)
    return logits


# ---- CIFAR networks


@pytest.mark.parametrize("name", PUBLISHED)
def test_cifar_networks(name: str) -> None:
    model = fresh(f"cifar:{name}", 100)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == PUBLISHED[name]
    check_cut(model, 32, 100)
    assert model.feature_dim == DIMENSIONS.get(name, model.feature_dim)
    model.train()(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "every layer is used"


def test_a_channel_shuffle_deals_channels_out() -> None:
    from fastdcd.cifar.layers import shuffle_channels

    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle_channels(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    torch.testing.assert_close(shuffle_channels(channels, 2), nn.ChannelShuffle(2)(channels))


# ---- networks of other libraries


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks_open_up_and_export_under_their_own_names(name: str, tmp_path: Path) -> None:
    """The same weights give the same logits in the plain network, and travel both ways through a file."""
    model, library = fresh(name), plain(name)
    logits = check_cut(model, FOREIGN[name], 7)
    weights.save(tmp_path / "out.safetensors", model.original_state_dict())
    library.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    images = torch.randn(2, 3, FOREIGN[name], FOREIGN[name], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(library(images), logits)
    again = models.build(name, classes=7).eval()
    weights.load_into(again, tmp_path / "out.safetensors")
    assert weights.digest(again.original_state_dict()) == weights.digest(library.state_dict())


def test_foreign_teacher_and_student_distil(digits: Digits, tmp_path: Path) -> None:
    teacher, student = "timm:mobilenetv3_small_050", "torchvision:resnet18"
    torch.manual_seed(0)
    torch.save({"epoch": 3, "state_dict": plain(teacher, 10).state_dict()}, tmp_path / "teacher.pth")
    summary = train(
        digits.config(
            tmp_path / "run",
            student={"model": student, "image_size": 32},
            teacher={"mode": "online", "model": teacher, "checkpoint": str(tmp_path / "teacher.pth")},
            loss={"kd": 1.0, "dcd": 1.0},
            data={"batch_size": 250},
            train={"epochs": 1},
        )
    )
    assert summary["finished"]
    plain(student, 10).load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)


def test_normalisation_follows_the_pretrained_weights() -> None:
    assert models.preprocessing("timm:tf_efficientnet_lite0") == ((0.5,) * 3, (0.5,) * 3)
    assert models.preprocessing("timm:resnet18") == (models.IMAGENET_MEAN, models.IMAGENET_STD)
    assert models.preprocessing("torchvision:resnet18") == (models.IMAGENET_MEAN, models.IMAGENET_STD)
    assert models.preprocessing("cifar:vgg8") == (models.CIFAR100_MEAN, models.CIFAR100_STD)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normalize = models.normalize_for("timm:resnet18", mean=(0.1, 0.2, 0.3))
    expected = torchvision.transforms.v2.functional.normalize(
        images.float() / 255, [0.1, 0.2, 0.3], list(models.IMAGENET_STD)
    )
    torch.testing.assert_close(normalize(images), expected)


# ---- networks of a user's file

NETWORKS = """
from torch import nn

class Two(nn.Module):
    "A hidden layer with as many outputs as classes must not be taken for the classifier."
    def __init__(self, num_classes):
        super().__init__()
        self.hidden = nn.Linear(12, num_classes)
        self.head = nn.Linear(num_classes, num_classes)
    def forward(self, images):
        return self.head(self.hidden(images.flatten(1)).relu())

def no_linear(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 2), nn.Flatten())

def features_of_pixels(num_classes):
    return nn.Sequential(nn.Linear(2, num_classes))

def list_of_layers(num_classes):
    return [nn.Linear(12, num_classes)]

def no_argument():
    return nn.Linear(12, 7)

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7))

def other_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8))

def fails(num_classes):
    return nn.Linear(12)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETWORKS)
    return tmp_path / "nets.py"


def test_a_network_from_a_file(file: Path) -> None:
    model = fresh(f"{file}:Two")
    assert model.classifier_name == "head"
    check_cut(model, 2, 7)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_linear", ["Sequential", "no final nn.Linear with 7 outputs"]),
        ("list_of_layers", ["list_of_layers gives list", "torch.nn.Module"]),
        ("no_argument", ["one nn.Linear and nothing else"]),
        ("other_classes", ["other_classes() takes no num_classes", "from nets import other_classes"]),
        ("fails", ["fails(num_classes=7) fails", "TypeError"]),
        ("Too", ["no function 'Too'", "did you mean Two"]),
    ],
)
def test_networks_of_a_file_that_do_not_fit(file: Path, function: str, says: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        models.build(f"{file}:{function}", classes=7)
    assert all(each in str(error.value) for each in says), error.value


def test_a_function_without_num_classes_works_if_its_output_fits(file: Path) -> None:
    check_cut(fresh(f"{file}:seven"), 2, 7)


def test_modules_beside_a_file_can_be_imported_and_belong_to_it_alone(tmp_path: Path) -> None:
    """Two repositories, both with a module `blocks` of their own; nothing of either stays importable."""
    for name, width in (("one", 3), ("two", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "blocks.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / name / "net.py").write_text(
            "from dataclasses import dataclass\nfrom torch import nn\nfrom blocks import WIDTH\n"
            "@dataclass\nclass Size:\n    width: int = WIDTH\n"
            "def net(num_classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(12, Size().width), nn.Linear(WIDTH, num_classes))\n"
        )
    path, modules = list(sys.path), set(sys.modules)
    assert [fresh(f"{tmp_path}/{name}/net.py:net").feature_dim for name in ("one", "two")] == [3, 5]
    assert sys.path == path and "blocks" not in set(sys.modules) - modules


# ---- networks without a classifier, and image sizes


@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [
        ("timm:resnet18", 64, 512),
        ("timm:vit_tiny_patch16_224", 224, 192),  # class token
        ("timm:vit_tiny_patch16_224", 64, 192),  # at another size
        ("timm:deit_tiny_distilled_patch16_224", 224, 192),  # class and distillation token
        ("timm:resnetv2_50", 64, 2048),  # ends in a convolution
        ("torchvision:resnet18", 64, 512),
        ("torchvision:swin_t", 64, 768),
        ("cifar:resnet8", 32, 64),
    ],
)
def test_features_alone(name: str, size: int, dim: int) -> None:
    model = models.build(name, classes=0, sizes=[size]).eval()
    features, logits = model(torch.randn(2, 3, size, size))
    assert features.shape == (2, dim) == (2, model.feature_dim) and logits.shape == (2, 0)


def test_features_alone_are_those_before_the_classifier(tmp_path: Path) -> None:
    """A checkpoint's classifier is left out, whatever its classes; all other tensors must be there."""
    for name in ("timm:vit_tiny_patch16_224", "torchvision:resnet18"):
        whole = fresh(name, 9)
        torch.save({"state_dict": whole.original_state_dict()}, tmp_path / "x.pth")
        model = models.build(name, classes=0, sizes=[224]).eval()
        weights.load_into(model, tmp_path / "x.pth", what="teacher")
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(model.features(images), whole.features(images), rtol=0, atol=0)
        tensors = whole.original_state_dict()
        tensors.pop(next(iter(tensors)))
        torch.save(tensors, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="1 tensors missing, 0 unexpected"):
            weights.load_into(model, tmp_path / "x.pth", what="teacher")


def test_features_of_a_files_network_without_classifier(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def features(): return nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def pixels(): return nn.Conv2d(3, 5, 1)\n"
    )
    assert models.build(f"{tmp_path}/net.py:features", classes=0, sizes=[8]).feature_dim == 5
    with pytest.raises(ValueError, match=r"pixels gives \[1, 5, 8, 8\] without a classifier"):
        models.build(f"{tmp_path}/net.py:pixels", classes=0, sizes=[8])


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_transformers_of_timm_take_other_sizes_with_the_same_weights(name: str, tmp_path: Path) -> None:
    """What is trained at 64 px loads strictly into the network as timm builds it for 224 px, and the other way."""
    model = models.build(name, classes=7, sizes=[64, 96]).train()
    models.check_sizes(model, name, [64, 96], "student.image_size")
    assert model.training
    plain(name).load_state_dict(model.original_state_dict(), strict=True)
    weights.save(tmp_path / "x.safetensors", plain(name).state_dict())
    weights.load_into(model, tmp_path / "x.safetensors")


def test_a_size_that_a_network_does_not_take_is_one_line_with_its_key(digits: Digits, tmp_path: Path) -> None:
    for name, says in (
        ("torchvision:vit_b_16", "Expected 224 but got 32"),
        ("timm:vit_tiny_patch16_224", "divisible by patch size"),
    ):
        size = 32 if "torchvision" in name else 24
        student = {"model": name, "image_size": size}
        ran = run_program("fastdcd/train.py", "--config", digits.file(tmp_path / "x.yaml", student=student))
        assert ran.code == 2 and ran.err.count("\n") == 1, ran.err
        assert f"student.image_size: got {size}" in ran.err and says in ran.err
    assert not (tmp_path / "run").exists()


ONLY_EVALUATES = """
from torch import nn

class Two(nn.Sequential):
    def forward(self, x):
        out = super().forward(x)
        return {"out": out} if self.training else out

def student(num_classes):
    return Two(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("torchvision:googlenet", 96, ""),
        ("torchvision:inception_v3", 80, ""),
        ("two.py:student", 8, "gives dict before its classifier"),
    ],
)
def test_a_student_that_gives_something_else_in_training_is_refused_before_it(
    digits: Digits, tmp_path: Path, name: str, size: int, says: str
) -> None:
    (tmp_path / "two.py").write_text(ONLY_EVALUATES)
    name = name if name.startswith("torchvision") else f"{tmp_path}/{name}"
    file = digits.file(tmp_path / "x.yaml", student={"model": name, "image_size": size}, teacher={"mode": "none"})
    ran = run_program("fastdcd/train.py", "--config", file)
    assert ran.code == 2 and ran.err.count("\n") == 1, ran.err
    assert "student.model: works for evaluation and not for training" in ran.err and says in ran.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_its_auxiliary_classifiers_it_trains(tmp_path: Path) -> None:
    """As the message says."""
    (tmp_path / "own.py").write_text(
        "import torchvision\n"
        "def student(num_classes): "
        "return torchvision.models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=False)\n"
    )
    model = models.build(f"{tmp_path}/own.py:student", classes=7)
    models.check_training(model, "own.py:student", [64])


# What is known of a published checkpoint's preprocessing is in its library: ours must be the same for every one.


def test_normalisation_is_every_librarys_own() -> None:
    """torchvision's Inception networks normalise once more inside, where it loads their weights itself: ours is both
    steps in one."""
    for name in torchvision.models.list_models(module=torchvision.models):
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        mean, std = list(transforms.mean), list(transforms.std)
        if name in ("googlenet", "inception_v3"):
            network = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
            shift, scale = network._transform_input(torch.stack([torch.zeros(3), torch.ones(3)])[..., None, None])
            scale = scale - shift  # x -> shift + scale x, a channel each
            mean = [m - s * float(a / b) for m, s, a, b in zip(mean, std, shift, scale, strict=True)]
            std = [s / float(b) for s, b in zip(std, scale, strict=True)]
        ours = models.preprocessing(f"torchvision:{name}")
        assert np.allclose(ours, (mean, std), atol=1e-6), name
    for name in timm.list_models(pretrained=True):
        settings = timm.get_pretrained_cfg(name)
        assert models.preprocessing(f"timm:{name}") == (settings.mean, settings.std), name


def test_files_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        models.build(f"{tmp_path}/missing.py:net", classes=7)
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="fails on import: ModuleNotFoundError"):
        models.build(f"{tmp_path}/broken.py:net", classes=7)


def test_features_that_are_not_pooled(file: Path) -> None:
    model = fresh(f"{file}:features_of_pixels")
    with pytest.raises(ValueError, match=r"\[2, 3, 2, 2\] before its classifier, expected \[n, 2\]"):
        model(torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar:resnet65", "resnet56"),
        ("cifar:mobilenet", "mobilenetv2"),
        ("torchvision:resnet81", "torchvision:resnet18"),
        ("timm:efficientnet_lte0", "timm:efficientnet_lite0"),
        ("timm:resnet18.a1_in1", "timm:resnet18.a1_in1k"),
        ("timm:deit_tiny_distilled_patch16_224", "ends in 2 classifiers"),
        ("timm:resnetv2_50", "no final nn.Linear"),
        ("resnet18", "torchvision:NAME, timm:NAME, cifar:NAME or path/to/file.py:callable"),
        ("keras:resnet18", "expected torchvision:NAME"),
    ],
)
def test_unknown_networks_name_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        models.build(name, classes=7)
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- weight files


@pytest.fixture(scope="module")
def student() -> models.FeatureModel:
    return fresh("cifar:resnet8")


def wrapped(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "bare": tensors,
        "state_dict": {"state_dict": tensors, "epoch": 90, "best": 0.7, "arch": "resnet8"},
        "model": {"model": tensors, "optimizer": {"state": {}}},
        "DDP": {"state_dict": {f"module.{name}": value for name, value in tensors.items()}},
        "compiled DDP": {f"_orig_mod.module.{name}": value for name, value in tensors.items()},
        "twice": {"net": {"model_state": tensors}},
    }


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar"])
@pytest.mark.parametrize("wrapper", wrapped({}))
def test_wrappers(student: models.FeatureModel, tmp_path: Path, wrapper: str, suffix: str) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(wrapped(student.original_state_dict())[wrapper], path)
    other = models.build("cifar:resnet8", classes=7)
    assert weights.digest(other.original_state_dict()) != weights.digest(student.original_state_dict())
    weights.load_into(other, path)
    assert weights.digest(other.original_state_dict()) == weights.digest(student.original_state_dict())
    assert models.trained_classes("cifar:resnet8", path) == 7


def test_safetensors_with_a_prefix(student: models.FeatureModel, tmp_path: Path) -> None:
    weights.save(tmp_path / "x.safetensors", {f"module.{k}": v for k, v in student.original_state_dict().items()})
    weights.load_into(models.build("cifar:resnet8", classes=7), tmp_path / "x.safetensors")


class Malicious:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_does_not_run(student: models.FeatureModel, tmp_path: Path) -> None:
    bomb = Malicious(f"touch {tmp_path}/exploded")
    torch.save({"model": student.original_state_dict(), "epoch": bomb}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb.pth: cannot be read safely"):
        weights.load(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the test's pickle must be one that would have run"


def test_other_names_load_by_order_only_when_asked(tmp_path: Path) -> None:
    """As pretrained EfficientNet-Lites are published: timm's tensors, in timm's order, under other names."""
    model = fresh("timm:tf_efficientnet_lite0")
    renamed = {f"_blocks.{n}": value for n, value in enumerate(model.original_state_dict().values())}
    torch.save(renamed, tmp_path / "lite0.pth")
    other = models.build("timm:tf_efficientnet_lite0", classes=7).eval()
    with pytest.raises(ValueError, match=r"fit in order: set teacher\.checkpoint_by_order=true"):
        weights.load_into(other, tmp_path / "lite0.pth", what="teacher")
    weights.load_into(other, tmp_path / "lite0.pth", by_order=True)
    torch.testing.assert_close(check_cut(other, 64, 7), check_cut(model, 64, 7))
    with pytest.raises(ValueError, match="another architecture"):
        weights.load_into(models.build("cifar:resnet8", classes=7), tmp_path / "lite0.pth", by_order=True)


def missing_one(tensors: dict[str, Tensor]) -> list[str]:
    tensors["layer1.0.convolution1.weight"] = tensors.pop("layer1.0.conv1.weight")
    return ["1 tensors missing", "first layer1.0.conv1.weight", "nearest in it: layer1.0.convolution1.weight"]


def other_classes(tensors: dict[str, Tensor]) -> list[str]:
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(100, 64), torch.zeros(100)
    return ["the checkpoint has 100 classes, the dataset has 7", "fc.bias"]


def other_shape(tensors: dict[str, Tensor]) -> list[str]:
    tensors["conv1.weight"], tensors["bn1.bias"] = torch.zeros(8, 3, 3, 3), torch.zeros(9)
    return ["2 of another shape", "conv1.weight", "[8, 3, 3, 3]", "[16, 3, 3, 3]"]


def nothing(tensors: dict[str, Tensor]) -> list[str]:
    tensors.clear()
    return ["no state dict in it"]


@pytest.mark.parametrize("damage", [missing_one, other_classes, other_shape, nothing])
def test_checkpoints_that_do_not_fit(
    student: models.FeatureModel, tmp_path: Path, damage: Callable[[dict[str, Tensor]], list[str]]
) -> None:
    tensors = student.original_state_dict()
    says = damage(tensors)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        weights.load_into(student, tmp_path / "x.pth")
    message = str(error.value)
    assert all(each in message for each in [*says, "x.pth"]) and "\n" not in message, message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(student: models.FeatureModel, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(ValueError, match="no such file"):
        weights.load(path)
    if suffix == ".pth":
        torch.save(student.original_state_dict(), path)
    else:
        weights.save(path, student.original_state_dict())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read safely"):
        weights.load(path)
    path.write_bytes(b"not a weight file")
    with pytest.raises(ValueError, match="cannot be read safely"):
        weights.load(path)


def test_a_wrong_teacher_is_one_line_for_the_user(digits: Digits, tmp_path: Path) -> None:
    weights.save(tmp_path / "t.safetensors", fresh("cifar:vgg8", 10).original_state_dict())
    teacher = {"mode": "online", "checkpoint": str(tmp_path / "t.safetensors"), "model": "cifar:wrn-10-1"}
    ran = run_program("fastdcd/train.py", "--config", digits.file(tmp_path / "x.yaml", teacher=teacher))
    assert ran.code == 2 and ran.err.count("\n") == 1 and "not a checkpoint of this teacher" in ran.err
