"""Recipes: every setting of a training run, typed, with its default, from a YAML file and dotted options."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from ..files import read_text, write_file
from . import old_names

if TYPE_CHECKING:
    from ..data.channels import Channels
    from ..data.split import Splitter


class RecipeError(ValueError):
    """A recipe or option that does not exist or has a wrong value: wrong usage, not a failed job."""


# Least and greatest value of fields, by their names in whatever section; numbers of other fields are finite.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("batch_size", "grad_accum_steps", "image_size", "epochs", "devices", "nodes", "threads", "log_steps"), (1, math.inf)
    ),
    **dict.fromkeys(("workers", "patience", "max_skipped_steps", "save_minutes", "seed", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("max_unreadable", "drop_path_rate", "ema", "hflip", "vflip", "random_erasing", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("lr", "warmup_lr", "min_lr", "mixup", "cutmix"), (0, math.inf)),
    **dict.fromkeys(
        ("lr_batch", "fpn_channels", "rois_per_image", "max_detections", "queries", "max_size", "channels"), (1, math.inf)
    ),
    **dict.fromkeys(("weight", "label_weight"), (0, math.inf)),
    "in_chans": (1, 4096),
    "temperature": (0.01, 1000),
    "rank": (1, 4096),
    "alpha": (1e-4, 1e4),
    "crop_pct": (0.01, 1),
    "mask_patch": (1, math.inf),
    "mask_share": (0.01, 0.99),
    "momentum": (0, 1),
    "local_crops": (0, 100),
    "local_size": (32, math.inf),
    "outputs": (2, math.inf),
    "teacher_temperature": (0.001, 1),
    "val_share": (0.01, 0.9),
    "folds": (2, math.inf),
    "fold": (1, math.inf),
}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as fields of a recipe have them."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint in (int, float):
        number = isinstance(value, int) if hint is int else isinstance(value, int | float) and math.isfinite(value)
        return number and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _expected(name: str, hint: Any) -> str:
    """Say what a field takes."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null", dict: "fields"}
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return f"fields, such as {', '.join(field.name for field in fields(hint)[:3])}"
    if origin in (Union, UnionType):
        return " or ".join(_expected(name if kind in (int, float) else "", kind) for kind in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is list and get_origin(inner[0]) is Literal:
        return f"a list of some of {', '.join(get_args(inner[0]))}"
    if origin in (list, tuple):
        kind = _expected("", inner[0]).rpartition(" ")[2]
        return f"a list of {len(inner) if origin is tuple else ''} {kind}s".replace("  ", " ")
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    span = f" from {low} to {high}" if high < math.inf else f" of at least {low}" if low > -math.inf else ""
    return names[origin or hint] + span


def _problem(name: str, value: Any, hint: Any, where: str = "") -> str:
    """Say what is wrong with the value of a field; nothing if it is right."""
    short = name.rpartition(".")[2]
    low, high = LIMITS.get(short, (-math.inf, math.inf))
    fits = _fits(value, hint) and (not isinstance(value, int | float) or low <= value <= high)
    shown = json.dumps(value, default=repr, ensure_ascii=False)
    return "" if fits else f"{where}{name} is {shown[:60]}, expected {_expected(short, hint)}"


@dataclass  # or else jsonargparse would not take what is made of it for one
class _Checked:
    """Fields whose values are checked when they are set together; ``~`` in paths is expanded."""

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            RecipeError: If one is not of its type or outside its limits.
        """
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            if problem := _problem(name, value, hints[name]):
                raise RecipeError(problem)
            if name in ("data", "root", "checkpoint", "out", "teacher") and value is not None:
                setattr(self, name, os.path.expanduser(value))  # noqa: PTH111 - Path drops the slashes of a URL


@dataclass
class Optimizer(_Checked):
    """The optimiser, by timm's names.

    Args:
        name: Any optimiser of timm: adamw, muon, lamb, lion, sgd, ...
        lr: Peak learning rate.
        lr_batch: The total batch (images x accumulation x processes) that `lr` and the schedule's rates are meant for; they are
            scaled linearly to the run's; none to take them as they are.
        weight_decay: Decay of all parameters but biases and other 1-D parameters.
        layer_decay: Factor of the learning rate from a block to the one before it; none for equal rates.
        clip_grad: Largest norm of the gradient; none for no limit.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch: int | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = 5.0


@dataclass
class Schedule(_Checked):
    """The learning rate over time, by timm's names; updated after every step.

    Args:
        name: How the rate falls from its peak.
        warmup_epochs: Epochs of linear warm-up, or a fraction of one.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end.
        milestones: Epochs at which multistep drops the rate.
        decay_rate: Factor of a drop of step and multistep; power of poly.
    """

    name: Literal["cosine", "poly", "tanh", "step", "multistep", "constant", "wsd", "rsqrt"] = "cosine"
    warmup_epochs: float = 1
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1


@dataclass
class Augmentation(_Checked):
    """What is done to training images, by timm's names.

    Args:
        scale: Range of the area of the random crop.
        ratio: Range of its aspect ratio.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of the colour jitter; none for none. Ignored with `auto_augment`.
        auto_augment: Policy such as rand-m9-mstd0.5-inc1; none for none.
        random_erasing: Probability to erase a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        label_smoothing: Weight of the uniform distribution in the targets.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333333333)
    hflip: float = 0.5
    color_jitter: float | None = 0.3
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1


@dataclass
class Distillation(_Checked):
    """A teacher, from which a classifier learns besides the labels.

    Args:
        teacher: A run, a checkpoint, a variant whose released weights are there, or any model of timm; none for no teacher.
        kind: logits: the teacher's probabilities of the classes, matched by name; features: the vector before its classifier,
            through a linear layer where the widths differ.
        weight: Of the teacher's loss.
        label_weight: Of the labels' loss; 0 to learn from the teacher alone.
        temperature: Divides the logits of both.
    """

    teacher: str | None = None
    kind: Literal["logits", "features"] = "logits"
    weight: float = 1.0
    label_weight: float = 1.0
    temperature: float = 2.0


@dataclass
class AdapterSettings(_Checked):
    """Fine-tuning few parameters of a checkpoint of a classifier, whose others stay as they are; its last layer is trained too.

    Args:
        kind: lora (by peft), adaptformer, linear_probe for the last layer alone, or none to train everything.
        rank: Width of the bottlenecks of lora and adaptformer.
        alpha: For lora, what its products are multiplied by, times the rank; by default twice the rank. For adaptformer, what
            its results are multiplied by; by default 0.1.
        targets: For lora, the names of the linear layers that are adapted.
    """

    kind: Literal["none", "lora", "adaptformer", "linear_probe"] = "none"
    rank: int = 8
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: ["qkv", "proj", "fc1", "fc2"])


@dataclass
class DetectorSettings(_Checked):
    """A detector of torchvision, or RT-DETR of transformers, over a backbone of timm, and what is done to its images.

    Args:
        architecture: retinanet (boxes, one stage), faster_rcnn (boxes, two stages), mask_rcnn (and masks), keypoint_rcnn (and
            keypoints) or rt_detr (boxes, without anchors).
        sizes: Shorter sides of training images besides image_size, in pixels; one of all is drawn for each image.
        max_size: Limit of the longer side, in pixels.
        fpn_channels: Channels of the feature pyramid and of the heads, or of RT-DETR's encoder and decoder; 256 in the papers.
        anchor_scale: Side of the smallest anchors, in strides of their level: 8 is 32 pixels at stride 4.
        rois_per_image: For two stages, the regions of a training image from which the second one learns.
        max_detections: Limit of the objects that are found in an image.
        queries: Objects that rt_detr looks for in an image; its maps need as many places.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of the jitter of brightness, contrast and saturation; 0 for none.
        freeze_bn: Keep the statistics of the backbone's BatchNorm as they are in the checkpoint: for small batches.
    """

    architecture: Literal["retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn", "rt_detr"] = "mask_rcnn"
    sizes: list[int] = field(default_factory=list)
    max_size: int = 1333
    fpn_channels: int = 256
    anchor_scale: float = 8.0
    rois_per_image: int = 512
    max_detections: int = 100
    queries: int = 300
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    freeze_bn: bool = False


@dataclass
class SegmenterSettings(_Checked):
    """A decoder of segmentation_models_pytorch, or Mask2Former, over a backbone of timm, and what is done to its images.

    Args:
        decoder: upernet, fpn, or another of segmentation_models_pytorch by its name, or mask2former.
        channels: Width of upernet, fpn and mask2former; none for the library's.
        aux_loss_weight: Weight of the loss of a second head on the features of stride 16, for training only; 0 for no head.
        scale: Range of the shorter side of a training image in parts of image_size, before a square of that size is cut out.
        hflip: Probability of a horizontal flip.
        photometric: Change brightness, contrast, saturation and hue at random.
        freeze_bn: Keep the statistics of the backbone's BatchNorm as they are in the checkpoint: for small batches.
        queries: Regions that mask2former looks for.
    """

    decoder: str = "upernet"
    channels: int | None = None
    aux_loss_weight: float = 0.4
    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    photometric: bool = True
    freeze_bn: bool = False
    queries: int = 100


@dataclass
class PretrainSettings(_Checked):
    """Self-supervised pre-training of a backbone of timm.

    Args:
        method: simmim: fill in masked parts of images; dino: agree with a teacher, the average of the network itself, about
            views of an image.
        scale: Range of the area of the random crop; none for the method's, 0.67 to 1 for simmim, 0.4 to 1 for dino.
        hflip: Probability of a horizontal flip.
        mask_patch: For simmim, side of the squares that are masked, in pixels; image_size must be a multiple of it.
        mask_share: For simmim, share of them that is masked.
        local_crops: For dino, small views of an image that the network sees besides two large ones; 0 for none.
        local_size: For dino, their side in pixels.
        local_scale: For dino, range of their area.
        outputs: For dino, width of the last layer of its head; 65536 in the paper, for ImageNet.
        momentum: For dino, of the teacher at the start; it grows to 1 along a cosine.
        teacher_temperature: For dino, divides the teacher's outputs; the network's are divided by 0.1.
    """

    method: Literal["simmim", "dino"] = "simmim"
    scale: tuple[float, float] | None = None
    hflip: float = 0.5
    mask_patch: int = 32
    mask_share: float = 0.6
    local_crops: int = 4
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    outputs: int = 4096
    momentum: float = 0.996
    teacher_temperature: float = 0.04


@dataclass
class Recipe(_Checked):
    """A training run.

    Args:
        task: What is learnt: classification, detection (instance segmentation included), (semantic) segmentation, pretraining
            (without labels), or a task of another package.
        data: The data set. For classification: digits, a folder with train/ and val/ of one folder per class, timm's
            torch/..., hfds/..., hfids/..., wds/..., or, with several labels for an image, a CSV file, a folder with labels.csv
            or train.csv and val.csv, or a data set for detection. For detection: a folder with COCO annotations. For
            segmentation: a folder with images/, masks/ and classes.json, or one like ADE20K's. For pretraining: a folder of
            images, in any nesting.
        val_share: Share of the images to hold out of a data set without train and val; near duplicates stay together. The split
            is stored in the run folder, as split.json.
        folds: For cross-validation of such a data set: parts that are held out in turn, each by a run in a folder of its own.
        fold: Train the run of this fold alone, from 1.
        root: Where timm's data sets lie: a folder; for wds/ also a URL.
        download: Fetch a torch/ data set that is not there.
        model: Model to train: a variant (mobile, tiny, small, base, large) or any model of timm; for detection and
            segmentation, the backbone.
        model_options: Arguments of the model's constructor by timm's names, such as mixer, mixer_options or embed_dims of ours;
            not with a checkpoint, which has its own.
        checkpoint: Weights to start from: a released file, a run, or any file that load_checkpoint reads.
        image_size: Side of the training images, in pixels; also of the test images. For detection and segmentation, the shorter
            side.
        in_chans: Channels of the images: 3 for colour, 1 for grey, others from TIFF files and arrays (docs/data.md).
        mean: Of each channel, as gmf data --statistics prints it; empty for the model's own.
        std: Their standard deviations.
        display_channels: The three of other channels that are shown as red, green and blue, or the one in grey; by default the
            first three, or the first of fewer.
        channels_first: Whether the first axis of an array is that of its channels, or the last (false); none for the axis whose
            length is in_chans.
        crop_pct: For classification, the share of a test image's shorter side that the centre crop keeps.
        epochs: Passes over the training images.
        patience: Epochs without a better validation accuracy after which the run stops; none to never stop early.
        batch_size: Images at once on each process.
        grad_accum_steps: Batches whose gradients are added up for one step.
        drop_path_rate: Stochastic depth of the last block.
        ema: Decay of the EMA weights (exponential moving average), which are then validated and saved; none for no EMA.
        workers: Processes that load images for each process that trains; 0 loads in the training process.
        max_unreadable: Share of the training images that may be unreadable; fewer are replaced and counted, more stop the run.
        max_skipped_steps: Steps in a row that may be skipped because their gradients are not finite before the run stops.
        save_minutes: Minutes between checkpoints inside an epoch; each epoch ends with one too.
        log_steps: Steps between entries of the loggers; metrics.csv has a row for each epoch.
        loggers: Which of tensorboard, csv (steps/metrics.csv), wandb and mlflow are told of every few steps.
        precision: fp32, or bf16 or fp16 for mixed precision, whose weights stay fp32; auto is bf16 on CUDA where the GPU has
            it, otherwise fp32.
        compile: Compile the model with torch.compile, block by block; auto does so on CUDA where all images are of one size.
        grad_checkpointing: Recompute activations in the backward pass: less memory, slower.
        channels_last: Keep other models than GroupMixFormer, which always does, in channels_last memory.
        deterministic: Refuse operations that do not give the same result twice.
        device: auto, cpu, cuda, ...
        threads: CPU threads of each process; auto chooses the fastest number by measuring steps, again when they become slow.
            The number changes how sums are rounded, so deterministic leaves it to PyTorch.
        devices: Processes on this machine, each with its device; under torchrun and SLURM, theirs.
        nodes: Machines; under torchrun and SLURM, theirs.
        strategy: ddp copies the model to every process, fsdp shards it over them, for models that do not fit.
        seed: Of weights, order and augmentation.
        out: Folder of the run.
        optimizer: The optimiser.
        schedule: The learning rate over time.
        loss: For classification of images with several labels: bce, the mean of their binary cross entropies (the default), or
            asl, the asymmetric loss (arXiv 2009.14119), for many labels of which an image has few.
        balance: For classification, against classes of unequal numbers: loss weights each image by the inverse of its class's
            number, sampling shows each class equally often in an epoch of the same length; none for images as they are.
        elastic: For classification by a GroupMixFormer, shares of the MLPs' hidden units, such as 0.25,0.5,1: each step trains
            one of them, and gmf extract cuts them out.
        augmentation: For classification, what is done to training images.
        distill: For classification, a teacher.
        adapter: For classification, what of a checkpoint is trained, if not everything.
        detector: For detection, the detector and what is done to its images.
        segmenter: For segmentation, the decoder and what is done to its images.
        pretrain: For pretraining, the method and its settings.
        task_options: Fields of a task of another package, by its names.
    """

    data: str
    task: str = "classification"
    val_share: float | None = None
    folds: int | None = None
    fold: int | None = None
    root: str = "data"
    download: bool = False
    model: str = "groupmixformer_mobile"
    model_options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    image_size: int = 224
    in_chans: int = 3
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    display_channels: list[int] = field(default_factory=list)
    channels_first: bool | None = None
    crop_pct: float = 0.875
    epochs: int = 10
    patience: int | None = None
    batch_size: int = 64
    grad_accum_steps: int = 1
    drop_path_rate: float = 0.0
    ema: float | None = None
    workers: int = 2
    max_unreadable: float = 0.001
    max_skipped_steps: int = 20
    save_minutes: float = 10.0
    log_steps: int = 10
    loggers: list[Literal["tensorboard", "csv", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    grad_checkpointing: bool = False
    channels_last: bool = True
    deterministic: bool = False
    device: str = "auto"
    threads: int | Literal["auto"] = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    out: str = "runs/train"
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Literal["bce", "asl"] | None = None
    elastic: list[float] = field(default_factory=list)
    balance: Literal["loss", "sampling"] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    distill: Distillation = field(default_factory=Distillation)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    task_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields, each and together.

        Raises:
            RecipeError: If one is wrong.
        """
        super().__post_init__()
        if self.val_share is not None and self.folds is not None:
            raise RecipeError(f"got val_share {self.val_share} and folds {self.folds}, expected one of them")
        if self.elastic and (max(self.elastic) != 1 or min(self.elastic) <= 0):
            raise RecipeError(f"elastic is {self.elastic}, expected shares above 0, of which the greatest is 1")
        if self.fold is not None and self.fold > (self.folds or 0):
            raise RecipeError(f"got fold {self.fold} of folds {self.folds}, expected a number from 1 to that of the folds")
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.in_chans) or min(self.std, default=1) <= 0:
            what = f"mean {self.mean} and std {self.std}"
            raise RecipeError(
                f"got {what}, expected a number of each for {self.in_chans} channels (in_chans), std above 0, or none"
            )
        shown = self.display_channels
        if len(shown) not in (0, 1, 3) or not all(0 <= channel < self.in_chans for channel in shown):
            raise RecipeError(f"display_channels is {shown}, expected one channel or three, from 0 to {self.in_chans - 1}")

    @property
    def channels(self) -> "Channels":
        """How images are read."""
        from ..data.channels import Channels

        return Channels(self.in_chans, self.channels_first, tuple(self.display_channels))

    @cached_property
    def splitter(self) -> "Splitter | None":
        """What deals out data without parts, if the recipe says so: as the split.json of the run to be continued, or anew."""
        if self.val_share is None and self.folds is None:
            return None
        from ..data.split import Splitter
        from ..run_folder import PREVIOUS, SPLIT

        out = Path(self.out)
        stored = [out / SPLIT] if self.last_checkpoint.exists() or (out / PREVIOUS).exists() else []
        stored += [out.parent / SPLIT] if self.fold else []
        return Splitter(self.val_share, self.folds, self.fold, self.seed, stored)

    @property
    def last_checkpoint(self) -> Path:
        """Where the run's last checkpoint lies."""
        from ..run_folder import CHECKPOINT  # with PyTorch, which options and their errors need not wait for

        return Path(self.out, CHECKPOINT)


TASK_FIELDS = {
    "classification": ("root", "download", "crop_pct", "loss", "elastic", "balance", "augmentation", "distill", "adapter"),
    "detection": ("detector",),
    "segmentation": ("segmenter",),
    "pretraining": ("pretrain",),
}
# What fields are called elsewhere, where that is not like the name here.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "pretrained": "checkpoint",
    "weights": "checkpoint",
    "num_workers": "workers",
    "output": "out",
}
OTHER_FIELDS = ("task_options",)  # of tasks that other packages bring
HISTORY = "history"  # what the recipe.yaml of a run has besides: how its fields changed while it was trained


def task_fields(task: str) -> tuple[str, ...]:
    """Return the fields of a recipe that are for this task and not for every task.

    Raises:
        RecipeError: If there is no such task, with the nearest name.
    """
    known = [*TASK_FIELDS, *sorted(entry_points(group="groupmixformer.tasks").names - set(TASK_FIELDS))]
    if task not in known:
        near = get_close_matches(task, known, n=1, cutoff=0.0)[0]
        raise RecipeError(f"no task {task}, expected one of {', '.join(known)}: the nearest is {near}")
    return TASK_FIELDS.get(task, OTHER_FIELDS)


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """Every field of `recipe` that its task has a use for, with its value."""
    unused = {*OTHER_FIELDS, *(name for names in TASK_FIELDS.values() for name in names)} - {*task_fields(recipe.task)}
    return {name: value for name, value in asdict(recipe).items() if name not in unused}


def shipped() -> dict[str, Path]:
    """Names and files of the recipes that come with the package."""
    folder = Path(str(resources.files("groupmixformer") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class _Parser(jsonargparse.ArgumentParser):
    def format_help(self, formatter: Any = None) -> str:
        return re.sub(r"--[a-z_.]+", lambda option: option[0].replace("_", "-"), super().format_help(formatter))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise RecipeError(" ".join(message.split()))


def parser() -> jsonargparse.ArgumentParser:
    """Return the parser of all fields as dotted options, e.g. for its help."""
    result = _Parser(prog="gmf train RECIPE", usage="gmf train RECIPE [--FIELD VALUE ...]", add_help=False)
    result.add_class_arguments(Recipe)
    return result


def _fields(values: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in values.items():
        names.append(prefix + name)
        if isinstance(value, dict):
            names += _fields(value, f"{prefix}{name}.")
    return names


def _refuse_unknown(given: Sequence[str], source: str) -> None:
    known = _fields(asdict(Recipe(data="")))
    for name in given:
        if name not in known and name.split(".")[0] not in ("model_options", *OTHER_FIELDS):
            near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, known, n=1, cutoff=0.4)
            near = near or [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
            hint = f"the nearest is {near[0]}" if near else f"fields are {', '.join(known)}"
            raise RecipeError(f"{source} has no field {name}: {hint}")


def _refuse_unused(given: Sequence[str], task: str) -> None:
    """Refuse fields that would be without effect."""
    used = task_fields(task)
    for other, names in {**TASK_FIELDS, "tasks of other packages": OTHER_FIELDS}.items():
        for name in given:
            if name.split(".")[0] in set(names) - {*used}:
                raise RecipeError(f"{name} is a field for {other}, and the recipe's task is {task}")


def _underscored(word: str) -> str:
    """Return an option with underscores for the dashes in its name, as fields have them; other words as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _explained(error: RecipeError, values: Mapping[str, Any], where: str) -> RecipeError:
    """Return an error of jsonargparse in the words of `_problem`; another one, with where it comes from."""
    name = ".".join(re.findall(r'Parser key "([\w.]+)"', str(error)))  # sections name theirs inside
    hint: Any = Recipe
    value: Any = values
    for part in name.split("."):
        hint = get_type_hints(hint).get(part) if is_dataclass(hint) else None
        value = value.get(name, value.get(part)) if isinstance(value, Mapping) else value
    problem = "" if hint is None else _problem(name, value, hint, where)
    return RecipeError(problem or (str(error) if str(error).startswith(where) else f"{where}{error}"))


def _check_fields(values: Mapping[str, Any], kind: Any, where: str, prefix: str = "") -> None:
    """Check the values that jsonargparse would take without a word, or refuse in words of its own."""
    for name, hint in get_type_hints(kind).items():
        if name in values and is_dataclass(hint):
            if not isinstance(values[name], dict):
                raise RecipeError(_problem(prefix + name, values[name], hint, where))
            _check_fields(values[name], hint, where, f"{name}.")
        elif (
            name in values
            and isinstance(values[name], int | float)
            and (problem := _problem(prefix + name, values[name], hint, where))
        ):
            raise RecipeError(problem)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise RecipeError(f"{path}: not a YAML file: {reason}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected fields of a recipe, such as data and epochs")
    return content


def read_recipe(name: str, options: Sequence[str] = ()) -> Recipe:
    """Read a recipe and override its fields; names that fields had before are understood.

    Args:
        name: A shipped recipe's name or a YAML file, such as the recipe.yaml of a run.
        options: Dotted options, e.g. ``["--optimizer.lr", "1e-4", "--data=photos"]``; dashes and underscores are the same.

    Raises:
        RecipeError: If the recipe or a field does not exist, or a value has the wrong type.
    """
    path = shipped().get(name, Path(name))
    if not path.is_file():
        near = get_close_matches(name, shipped(), n=1, cutoff=0.0)
        raise RecipeError(f"no recipe {name}: expected a YAML file or one of {', '.join(shipped())} (nearest: {near[0]})")
    made, raw = parser(), _read_yaml(path)
    raw.pop(HISTORY, None)
    try:
        raw = old_names.rename(raw)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    options = old_names.rename_options([_underscored(word) for word in options])
    named = [option[2:].split("=")[0] for option in options if option.startswith("--")]
    _refuse_unknown(_fields(raw), str(path))
    _refuse_unknown(named, "a recipe")
    given = {}
    for option, word in pairwise([*options, ""]):
        name, equals, value = option[2:].partition("=")
        given[name] = value if equals else word
    try:
        _check_fields(raw, Recipe, f"{path}: ")
        values = made.parse_object(raw, defaults=False)
    except RecipeError as error:
        raise _explained(error, raw, f"{path}: ") from None
    try:
        values = made.parse_args(options, namespace=values)
        _check_fields(values.as_dict(), Recipe, "--")
        recipe = Recipe(**made.instantiate(values).as_dict())
    except RecipeError as error:
        raise _explained(error, given, "--" if named else f"{path}: ") from None
    _refuse_unused([*_fields(raw), *named], recipe.task)
    return recipe


def write_recipe(recipe: Recipe, path: Path, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write the fields of `recipe`, so that `read_recipe` of the file gives it back, and how they changed while it ran."""
    changed = f"{HISTORY}:\n{yaml.safe_dump(list(history), sort_keys=False, default_flow_style=None)}" if history else ""
    write_file(path, to_yaml(recipe) + changed)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return how the fields of a run's recipe changed while it ran.

    Returns:
        For each time that it was continued with others the ``epoch``, as metrics.csv counts them, and ``step`` from which they
        held, and ``changed``: for each field, the value before and the one from then on. The recipe has those of the end.
    """
    history = _read_yaml(path).get(HISTORY) or []
    if not isinstance(history, list):
        raise RecipeError(f"{path}: {HISTORY} is {history}, expected what a run writes: leave it out")
    return history


def to_yaml(recipe: Recipe) -> str:
    """Every field of `recipe` that its task has a use for, as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(fields_of(recipe))), sort_keys=False)
