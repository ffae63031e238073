"""The module that is trained and that DDP wraps: student, loss terms, and what the terms learn.

Losses live inside and are called through `forward`: parameters used around DDP get no gradient sync.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdcd.average import MovingAverage
from fastdcd.config import Loss
from fastdcd.losses.terms import LossInputs
from fastdcd.models import FeatureModel, ModelOutput
from pipelines.augment import Mixed


class DistillModule(nn.Module):
    """The student and the loss terms whose weight is above zero."""

    def __init__(
        self,
        student: FeatureModel,
        normalize: nn.Module,
        config: Loss,
        *,
        teacher_dim: int = 0,
        teacher_classes: int | None = None,
    ) -> None:
        """`normalize` turns uint8 [n, 3, H, W] into the student's input; teacher_dim is d_t, 0 without one.

        Raises ValueError if the teacher has features only (teacher_classes = 0) and a term needs its logits.
        """
        super().__init__()
        self.student, self.normalize = student, normalize
        self.average: MovingAverage | None = None
        self.weights = {name: weight for name in config.terms if (weight := config.weight(name)) > 0}
        self.terms = nn.ModuleDict(
            {
                name: config.terms[name](config.settings(name), student.feature_dim, teacher_dim)
                for name in self.weights
            }
        )
        for name, term in self.terms.items():
            if term.needs_teacher_logits and teacher_classes == 0:
                raise ValueError(
                    f"loss.{name}: got {self.weights[name]}, but it needs the teacher's logits, and teacher.classifier is "
                    f"false; set loss.{name}=0 and compare features (loss.dcd), or take a teacher with a classifier"
                )

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        teacher: ModelOutput | None,
        mixed: Mixed | None,
        divisor: float,
        epoch: int = 0,
    ) -> dict[str, Tensor]:
        """The weighted loss and its parts for images uint8 [n, 3, H, W], labels int64 [n], and the other labels
        of mixed images.

        Returns "loss" (to call backward on) and the terms' named parts, detached, all 0-dimensional.
        """
        output = self._look(images)
        # the losses choose their own precision: bf16 over them costs up to 4 % of gradient error
        with torch.autocast(images.device.type, enabled=False):
            inputs = LossInputs(output, teacher, labels, divisor, epoch, mixed)
            total = images.new_zeros((), dtype=torch.float32)
            parts: dict[str, Tensor] = {}
            for name, term in self.terms.items():
                value, named = term(inputs)
                total = total + self.weights[name] * value
                parts.update(named)
        return {"loss": total, **parts}

    def _look(self, images: Tensor) -> ModelOutput:
        if len(images) or self.synchronised:
            output: ModelOutput = self.student(self.normalize(images))
            return output
        # This process has no share of the last batch. DDP still waits for its gradients, which are zero: a black
        # image is looked at, without touching BatchNorm statistics, and left out.
        self.student.eval()
        output = self.student(self.normalize(images.new_zeros(1, *images.shape[1:])))
        self.student.train()
        return ModelOutput(output.features[:0], output.logits[:0])

    @property
    def synchronised(self) -> bool:
        """Whether BatchNorm looks at all processes' rows, so that none may stay away."""
        return any(isinstance(each, nn.SyncBatchNorm) for each in self.student.modules())

    def start_average(self, decay: float) -> None:
        """Keep a moving average of the student's weights from here on."""
        self.average = MovingAverage(self.student, decay)

    def predict_average(self, images: Tensor) -> Tensor:
        """`predict` by the averaged student."""
        assert self.average is not None
        logits: Tensor = self.average(self.normalize(images)).logits
        return logits

    def predict(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images uint8 [n, 3, H, W], without any loss."""
        logits: Tensor = self.student(self.normalize(images)).logits
        return logits

    def after_step(self, number: int, taken: Tensor) -> None:
        """Let the terms bound what they learn and the average move, after optimizer step `number`; `taken` (bool,
        0-dimensional) says whether it was taken."""
        for term in self.terms.values():
            term.after_step()  # type: ignore[operator]
        if self.average is not None:
            self.average.update(self.student, number, taken)


def no_weight_decay(module: nn.Module, *, decay_norms_and_biases: bool) -> set[str]:
    """Names of parameters that take no weight decay.

    Always the temperature, its bias and the heads' biases; with decay_norms_and_biases false also every
    normalisation weight and bias of the student (all parameters of fewer than two dimensions).
    """
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 and not (decay_norms_and_biases and name.startswith("student."))
    }
