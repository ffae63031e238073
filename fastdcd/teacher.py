"""The frozen teacher: pooled features of images, and its own classifier for the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdcd import models, weights
from fastdcd.config import Config

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """A network that is only looked at: no gradients, no dropout, BatchNorm statistics that stay.

    Attributes:
        rows: images of one forward pass. A shorter batch is filled up with black images, so that every
            pass has one shape: a row's features then do not depend on the batch around it, bit for bit.
        size: height and width of the images it expects, pixels.
    """

    def __init__(
        self, network: models.FeatureModel, normalize: models.Normalize, *, size: int, rows: int, precision: str
    ):
        super().__init__()
        self.network, self.normalize = network, normalize
        self.size, self.rows, self.precision = size, rows, precision
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features float32 [n, d] of images uint8 [n, 3, size, size], before the classifier."""
        parts = [self._forward(part) for part in images.split(self.rows)]
        return torch.cat(parts) if parts else images.new_empty(0, self.network.feature_dim, dtype=torch.float32)

    def _forward(self, images: Tensor) -> Tensor:
        missing = self.rows - len(images)
        if missing:
            filling = images.new_zeros(missing, *images.shape[1:])
            images = torch.cat([images, filling]).contiguous(memory_format=torch.channels_last)
        dtype = _AUTOCAST[self.precision]
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            features = self.network.features(self.normalize(images))
        return features[: self.rows - missing].float()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits float32 [n, classes] of pooled features [n, d], by the teacher's own final layer."""
        with torch.autocast(features.device.type, enabled=False):
            return self.network.classifier(features.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


def load_teacher(config: Config, *, classes: int, rows: int, device: torch.device) -> Teacher:
    """Build the teacher of a config with its checkpoint.

    Args:
        config: its teacher section must name a model.
        classes: of the dataset; the teacher must have as many.
        rows: images of one forward pass.
        device: where it runs.

    Raises ValueError: no checkpoint, unknown model, or a checkpoint of another network or label count.
    """
    section = config.teacher
    assert section.model is not None
    if section.checkpoint is None:
        raise ValueError("teacher.checkpoint is missing: an untrained teacher teaches nothing")
    network = models.build(section.model, classes=classes)
    weights.load_into(network, section.checkpoint, what="teacher", by_order=section.checkpoint_by_order)
    teacher = Teacher(
        network,
        models.normalize_for(section.model, section.mean, section.std),
        size=config.teacher_size,
        rows=rows,
        precision=section.precision,
    )
    teacher.to(memory_format=torch.channels_last)
    return teacher.to(device)


def fingerprint(teacher: Teacher, model: str) -> dict[str, str]:
    """What of a teacher decides its features, for a cache: weights and preprocessing."""
    mean, std = teacher.normalize.mean, teacher.normalize.std
    return {
        "teacher.model": model,
        "teacher.weights": weights.digest(teacher.network.original_state_dict()),
        "teacher.image_size": str(teacher.size),
        "teacher.mean": str([round(value, 6) for value in mean]),
        "teacher.std": str([round(value, 6) for value in std]),
        "teacher.precision": teacher.precision,
    }
