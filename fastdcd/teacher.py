"""The frozen teacher: pooled features of images, and its own classifier for the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdcd import models, pretrained, weights
from fastdcd.config import Config

# A teacher is a student without a teacher.
_HOW_TO_TRAIN = (
    "accelerate launch fastdcd/train.py with student.model={model} and teacher.mode=none: its student.safetensors"
)
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Member(nn.Module):
    """A network and the normalisation it expects: images uint8 [n, 3, H, W] -> pooled features [n, d].

    Attributes:
        digest: of the weights as they were given.
    """

    def __init__(self, network: models.FeatureModel, normalize: models.Normalize) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize
        self.digest = weights.digest(network.original_state_dict())

    def cast(self, dtype: torch.dtype) -> None:
        """Hold the weights that autocast would cast to `dtype` in every pass (those that need no gradient are not
        kept between passes) in it for good: the same features, bit for bit. The classifier stays as it is."""
        for module in self.network.network.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                module.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(self.normalize(images))


class Teacher(nn.Module):
    """One or several networks that are only looked at: no gradients, no dropout, BatchNorm statistics that stay.

    Several teach together: features side by side, and the mean of their logits, which is a linear layer of
    those features like any single teacher's.

    Attributes:
        name: of all members, for messages.
        members: the networks.
        classifier: pooled features [n, feature_dim] -> logits [n, classes].
        feature_dim, classes: of all members together; no classes with teacher.classifier false.
        rows: images of one forward pass. A shorter batch is filled up with black images, so that every
            pass has one shape: a row's features then do not depend on the batch around it, bit for bit.
        size: height and width of the images it expects, pixels.
    """

    def __init__(self, members: Sequence[Member], *, size: int, rows: int, precision: str, name: str = "teacher"):
        super().__init__()
        self.name = name
        self.members: Sequence[Member] = nn.ModuleList(members)  # type: ignore[assignment]
        self.classifier = _joint_classifier([member.network.classifier for member in members])
        self.feature_dim, self.classes = self.classifier.in_features, self.classifier.out_features
        self.size, self.rows, self.precision = size, rows, precision
        self.eval().requires_grad_(False)
        if (dtype := _AUTOCAST[precision]) is not None:
            for member in self.members:
                member.cast(dtype)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features float32 [n, d] of images uint8 [n, 3, size, size], before the classifier."""
        parts = [self._forward(part) for part in images.split(self.rows)]
        return torch.cat(parts) if parts else images.new_empty(0, self.feature_dim, dtype=torch.float32)

    def _forward(self, images: Tensor) -> Tensor:
        missing = self.rows - len(images)
        if missing:
            filling = images.new_zeros(missing, *images.shape[1:])
            images = torch.cat([images, filling]).contiguous(memory_format=torch.channels_last)
        dtype = _AUTOCAST[self.precision]
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            features = [member(images)[: self.rows - missing].float() for member in self.members]
        return features[0] if len(features) == 1 else torch.cat(features, 1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits float32 [n, classes] of pooled features [n, d], by the teacher's own final layer."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


def _joint_classifier(layers: Sequence[nn.Linear]) -> nn.Linear:
    """The linear layer that takes features side by side to the mean of the layers' logits."""
    if len(layers) == 1:
        return layers[0]
    dim, classes = sum(layer.in_features for layer in layers), layers[0].out_features
    joint = nn.Linear(dim, classes) if classes else models.no_outputs(dim)
    with torch.no_grad():
        joint.weight.copy_(torch.cat([layer.weight for layer in layers], 1) / len(layers))
        biases: list[Tensor] = [
            layer.bias if layer.bias is not None else torch.zeros_like(joint.bias) for layer in layers
        ]
        joint.bias.copy_(torch.stack(biases).mean(0))
    return joint


def load_teacher(
    cfg: Config, *, classes: int, rows: int, device: torch.device, say: Callable[[str], object] = print
) -> Teacher:
    """Build the teacher of a config with its checkpoint.

    Args:
        cfg: its teacher section must name a model.
        classes: of the dataset; the teacher must have as many.
        rows: images of one forward pass.
        device: where it runs.
        say: called with a line for weights that were fetched.

    Raises ValueError: no checkpoint, unknown model, or a checkpoint of another network or label count.
    """
    section = cfg.teacher
    assert section.model is not None
    members = []
    for model, checkpoint in section.members:
        if checkpoint is None:
            raise ValueError(
                "teacher.checkpoint is missing: an untrained teacher teaches nothing; name its weights, or train it "
                f"first ({_HOW_TO_TRAIN.format(model=model)})"
            )
        if pretrained.is_published(checkpoint):
            checkpoint = pretrained.fetch(model, checkpoint, "teacher.checkpoint", say)
        if not checkpoint.exists():
            raise ValueError(
                f"teacher.checkpoint: {checkpoint}: no such file; train the teacher first "
                f"({_HOW_TO_TRAIN.format(model=model)}), or take published weights (teacher.checkpoint=pretrained)"
            )
        network = models.build(model, classes=classes if section.classifier else 0, sizes=[cfg.teacher_size])
        models.check_sizes(network, model, [cfg.teacher_size], "teacher.image_size")
        try:
            weights.load_into(network, checkpoint, what="teacher", by_order=section.checkpoint_by_order)
        except ValueError as error:
            raise ValueError(f"teacher.checkpoint: {error}") from None
        member = Member(network, models.normalize_for(model, section.mean, section.std))
        if section.compile:
            member.compile()  # in place: the names of its weights, and so its digest, stay the same
        members.append(member)
    name = " + ".join(model for model, _ in section.members)
    teacher = Teacher(members, size=cfg.teacher_size, rows=rows, precision=section.precision, name=name)
    teacher.to(memory_format=torch.channels_last)
    return teacher.to(device)


def fingerprint(teacher: Teacher) -> dict[str, str]:
    """What of a teacher decides its features, for a cache: weights and preprocessing of every member."""
    normalizations = [member.normalize for member in teacher.members]
    return {
        "teacher.model": teacher.name,
        "teacher.weights": " + ".join(member.digest for member in teacher.members),
        "teacher.image_size": str(teacher.size),
        "teacher.mean": " + ".join(str([round(value, 6) for value in each.mean]) for each in normalizations),
        "teacher.std": " + ".join(str([round(value, 6) for value in each.std]) for each in normalizations),
        "teacher.precision": teacher.precision,
    }
