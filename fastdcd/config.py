"""The configuration: frozen dataclasses, read strictly from YAML and from --set section.key=value.

An unknown key fails with its path and the nearest known one; a wrong type says what was expected. A
file may start from others: `base: ../base.yaml` (or a list) is read first, and what follows overrides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field

from pipelines.augment import Augment
from pipelines.base import LoaderOptions
from pipelines.files import user_path

# unknown keys and wrong types are errors
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# ~ is the home folder, $NAME a variable of the environment
UserPath = Annotated[Path, AfterValidator(user_path)]
# Bounds that no experiment reaches: a typing error is reported at once, not when memory is full.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Pixels = Annotated[int, Field(gt=0, le=2**14)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are and how they are read. A loader's own options are further keys: its class declares them."""

    __pydantic_config__ = STRICT
    train: UserPath
    """Training set: an ImageFolder tree (torch, dali) or what tools/convert.py wrote for the backend."""
    val: UserPath
    """Validation set, in the same format."""
    backend: str = "torch"
    """The loader: torch | resident | ffcv | dali, or one that a plugin registered."""
    order: Literal["random", "paged", "sequential"] = "random"
    """random: a full shuffle per epoch. paged: neighbours on disk stay close, for sets larger than memory."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Decoding processes or threads of each training process."""
    batch_size: Positive = 256
    """Images of one optimizer step, over all processes."""
    device: str = "auto"
    """auto, cpu, cuda: where training runs. auto takes the GPU if there is one."""
    classes: UserPath | None = None
    """A file of class names in label order, for folders; without it, sorted folder names."""
    on_decode_error: Literal["raise", "skip_and_report"] = "raise"
    """raise: an image that cannot be decoded ends the run. skip_and_report: it is shown black and named once."""
    loaders: ClassVar[Mapping[str, Any]] = {}  # name -> class, filled by config_file

    def __getattr__(self, key: str) -> Any:  # for type checkers: a loader's own keys are not known to them
        raise AttributeError(key)

    def __post_init__(self) -> None:
        for loader in self.loaders.values():
            loader.own_options(LoaderOptions(own=self.own))  # its own checks

    @property
    def own(self) -> dict[str, Any]:
        """Options that only one loader has, by name: its class declares them (Loader.Options)."""
        names = {each.name for loader in self.loaders.values() for each in fields(loader.Options)}
        return {name: getattr(self, name) for name in sorted(names)}


@dataclass(frozen=True, kw_only=True)
class Views:
    """How an image is cropped and mirrored in training. A teacher cache is valid for one such choice."""

    __pydantic_config__ = STRICT
    family: Literal["random_resized_crop", "pad_crop", "center"] = "random_resized_crop"
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized_crop: share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized_crop: width over height."""
    padding: Annotated[int, Field(ge=0, le=2**14)] = 4
    """pad_crop: black pixels around the stored image."""
    crop_ratio: Fraction = 1.0
    """center: side of the crop over the shorter side of the image."""
    flip: Annotated[float, Field(ge=0, le=1)] | Literal["alternating"] = 0.5
    """Probability of mirroring; alternating mirrors every image in every second view (arXiv 2404.00498)."""
    augment: Augment = field(default_factory=Augment)
    """What happens to a crop then: RandAugment, colour jitter, grayscale, erasing, mixup and cutmix. Its keys and their
    meaning: pipelines/augment.py. A mixed image is a view of its own: a cache holds the teacher's features of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Seed of the boxes and flips, apart from run.seed: students of different seeds share one cache."""
    count: Count = 0
    """Views of each image, shown in turn: epoch e shows view e modulo count. 0: a new one every epoch."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """The network that is trained."""

    __pydantic_config__ = STRICT
    model: str
    """torchvision:NAME, timm:NAME, cifar:NAME or path/to/file.py:callable."""
    classes: Positive | None = None
    """Number of classes; the dataset's own number if not given. Another number is an error."""
    checkpoint: UserPath | None = None
    """Weights to start from; `pretrained` and `hub:OWNER/NAME` as for teachers."""
    fresh_classifier: bool = False
    """Leave the checkpoint's final layer out: it was trained on other classes."""
    image_size: Pixels | dict[Count, Pixels] = 224
    """Pixels, or first epoch -> pixels for progressive resizing, as in {0: 160, 10: 192}."""
    channels_last: bool = True
    sync_bn: bool = False
    """BatchNorm statistics over all processes instead of over each one's own rows."""
    mean: tuple[float, float, float] | None = None
    """Normalisation, in 0..1 units; the model's own convention if not given."""
    std: tuple[float, float, float] | None = None


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen network that teaches."""

    __pydantic_config__ = STRICT
    mode: Literal["none", "online", "fill", "cached"] = "none"
    """none: train without one. online: a forward pass every step. cached: features from cache.path, filled by
    tools/cache_teacher.py. fill: online for the first views.count epochs, writing the cache; then cached."""
    model: str | tuple[str, ...] | None = None
    """As student.model. Several teach together: their features side by side, the mean of their logits."""
    checkpoint: UserPath | tuple[UserPath, ...] | None = None
    """.safetensors or .pth of the teacher; one for each of several. `pretrained` fetches the weights that timm or
    torchvision publish for the model, `hub:OWNER/NAME` (`@REVISION`, `:FILE`) those of the Hugging Face Hub."""
    checkpoint_by_order: bool = False
    """Match the checkpoint's tensors by order and shape instead of by name."""
    classifier: bool = True
    """False: pooled features alone, for teachers that have no classifier (self-supervised ones, several tokens) or
    one of other classes, which is left out. For losses that compare features; kd needs the logits of a classifier."""
    image_size: Pixels | None = None
    """Pixels at which the teacher sees the box; student.image_size if not given (and constant)."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the teacher's forward pass; part of a cache's fingerprint."""
    compile: bool = False
    """torch.compile the teacher. A cache may be filled with it and read without: the live check compares them."""
    evaluate: bool = True
    """Measure and print the teacher's accuracy before training."""

    def __post_init__(self) -> None:
        models, checkpoints = _several(self.model), _several(self.checkpoint)
        if checkpoints and len(checkpoints) != len(models):
            raise ValueError(
                f"checkpoint: got {len(checkpoints)} for {len(models)} models; give one for each model"
            )

    @property
    def members(self) -> tuple[tuple[str, Path | None], ...]:
        """Model and checkpoint of every teacher."""
        models, checkpoints = _several(self.model), _several(self.checkpoint)
        return tuple(zip(models, checkpoints or (None,) * len(models), strict=True))


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The teacher cache."""

    __pydantic_config__ = STRICT
    path: UserPath | None = None
    """Its folder; required by teacher.mode fill and cached."""
    dtype: Literal["fp16", "bf16", "fp32", "uint8"] = "fp16"
    """How features are stored. uint8 keeps an offset and a step for each row."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where rows are looked up: host memory (mapped from disk), or a whole view at a time on the GPU. auto: on the
    GPU if two views (the next one is loaded while one is trained with) take at most a quarter of its free memory."""
    views_a_pass: Positive = 4
    """Views that tools/cache_teacher.py fills at once: each image is decoded once for all of them."""
    check_rows: Count = 16
    """Rows recomputed with the live teacher when a cache is opened."""
    verify: bool = True
    """Compare each view with its checksums before its first epoch: the next one's while this one trains."""
    allow_backend: tuple[str, ...] = ()
    """Pairs such as "ffcv->dali": read a cache filled through the first while training with the second."""
    allow_environment: bool = False
    """Read a cache filled with other versions of the decoding libraries, on another device, or with another
    train.tf32. The live check says how far the features agree."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Weights and settings of the loss terms. A weight of 0 switches a term off and costs nothing.

    Its keys are declared by the terms themselves, in fastdcd/losses/terms.py: each one's name is its weight's key, and
    the fields of its Settings lie beside it.
    """

    __pydantic_config__ = STRICT
    terms: ClassVar[Mapping[str, Any]] = {}  # name -> class, filled by losses.terms.loss_section

    def __getattr__(self, key: str) -> Any:  # for type checkers: the keys are not known to them
        raise AttributeError(key)

    def __post_init__(self) -> None:
        for name in self.terms:
            self.settings(name)  # its own checks
        classifying = [name for name, term in self.terms.items() if term.trains_classifier]
        if self.terms and not any(self.weight(name) for name in classifying):
            raise ValueError(
                f"{', '.join(classifying)}: all are 0, so nothing would train the classifier; set one above 0"
            )

    def weight(self, name: str) -> float:
        """The weight of a term."""
        return float(getattr(self, name))

    def settings(self, name: str) -> Any:
        """A term's own settings: an instance of its class's Settings."""
        kind = self.terms[name].Settings
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})

    def with_weights(self, **weights: float) -> Self:
        """The same with other weights of some terms."""
        return replace(self, **weights)

    @property
    def taught(self) -> list[str]:
        """Names of the terms that are on and read the teacher's outputs."""
        return [name for name, term in self.terms.items() if term.needs_teacher and self.weight(name)]


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer."""

    __pydantic_config__ = STRICT
    name: str = "sgd"
    """sgd, adamw (torch), or timm:NAME."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Weight = 5e-4
    decay_norms_and_biases: bool = False
    """True decays every weight of the student, as the CIFAR recipes of the literature do."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a function of the step; optim.lr is its peak."""

    __pydantic_config__ = STRICT
    name: Literal["constant", "step", "cosine", "triangular", "one_cycle"] = "cosine"
    warmup: Weight = 0.0
    """Epochs of linear warm-up (triangular, one_cycle: until the peak)."""
    milestones: tuple[float, ...] = ()
    """step: epochs after which the rate is multiplied by gamma."""
    gamma: Fraction = 0.1


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    __pydantic_config__ = STRICT
    epochs: Positive = 100
    max_steps: Count = 0
    """Stop after this many steps, for a quick try; 0: no limit. The schedule does not change."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = True
    """On a GPU: convolutions of fp32 networks in TF32 (10 bits of mantissa), as is torch's default. False: in full
    fp32, several times slower. Matrix products, and so all losses, are never in TF32."""
    compile: bool | Literal["reduce-overhead"] = False
    """true: torch.compile the student, as graphs of static shapes; the short batch at the end of an epoch runs
    uncompiled. reduce-overhead: as CUDA graphs too, for steps that are limited by the host; not yet measured."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the student's weights, which is evaluated and saved beside it; 0: none."""
    accumulate: Positive = 1
    """Split each batch into this many parts to save memory; the optimizer still steps once a batch. BatchNorm
    and DCD's negatives then see a part at a time."""
    clip: Weight = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    checkpoint_every: Count = 0
    """Steps between checkpoints, beside the one after every epoch; 0: only those."""
    keep_checkpoints: Positive = 2
    log_every: Positive = 50
    """Steps between lines in metrics.jsonl. Each costs one wait for the device."""
    max_skipped: Positive = 20
    """A step whose gradient is not finite is skipped on every process; so many in a row end the run (noticed when
    a line is logged)."""
    timeout: Positive = 1800
    """Collective timeout, seconds: how long a process waits for the others before the run fails. Indexing a large folder or
    evaluating a teacher takes place within it."""
    resume: str = "none"
    """none, auto (from the newest checkpoint in run.dir, or from the start), or a checkpoint's path."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation on data.val."""

    __pydantic_config__ = STRICT
    every: Positive = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    image_size: Pixels | None = None
    """Pixels; the student's last training size if not given."""
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centre crop over the shorter side of the image (timm's crop_pct)."""
    flip: bool = False
    """Average the logits with those of the mirrored image."""
    batch_size: Positive = 256


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where results go."""

    __pydantic_config__ = STRICT
    dir: UserPath | None = None
    """The run's folder; for configs/A/B.yaml runs/A/B if not given."""
    seed: Seed = 0
    """Seed of the order, the initial weights and dropout."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers beside metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    __pydantic_config__ = STRICT
    data: Data
    student: Student
    views: Views = field(default_factory=Views)
    teacher: Teacher = field(default_factory=Teacher)
    cache: Cache = field(default_factory=Cache)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    run: Run = field(default_factory=Run)
    plugins: tuple[UserPath, ...] = ()
    """Python files that are imported before the rest of the config is read: they may register losses and loaders."""

    def __post_init__(self) -> None:
        if self.teacher.mode == "none" and (taught := self.loss.taught):
            names = " and ".join(f"loss.{name}" for name in taught)
            raise ValueError(
                f"teacher.mode is none but {names} {'is' if len(taught) == 1 else 'are'} above 0; set teacher.mode to "
                f"online, fill or cached, or {names} to 0"
            )
        if self.teacher.mode != "none" and self.teacher.model is None:
            raise ValueError(f"teacher.mode is {self.teacher.mode} but teacher.model is missing")
        if self.teacher.mode in ("fill", "cached") and self.cache.path is None:
            raise ValueError(f"teacher.mode is {self.teacher.mode} but cache.path is missing")
        if self.views.augment.mixes and self.data.batch_size % 2:
            raise ValueError(
                f"data.batch_size: got {self.data.batch_size}, expected an even number: views.augment mixes images in pairs"
            )
        progressive = isinstance(self.student.image_size, dict)
        if self.teacher.mode != "none" and self.teacher.image_size is None and progressive:
            raise ValueError("student.image_size changes with the epoch: teacher.image_size is needed")

    @property
    def view_count(self) -> int:
        """Distinct views of every image: views.count, or one per epoch."""
        return self.views.count or self.train.epochs

    def student_size(self, epoch: int) -> int:
        """The student's image size in an epoch, pixels."""
        size = self.student.image_size
        if isinstance(size, int):
            return size
        return size[max((first for first in size if first <= epoch), default=min(size))]

    @property
    def teacher_size(self) -> int:
        """The teacher's image size, pixels."""
        return self.teacher.image_size or self.student_size(0)

    @property
    def eval_size(self) -> int:
        """The student's image size in evaluation, pixels."""
        return self.eval.image_size or self.student_size(self.train.epochs - 1)
