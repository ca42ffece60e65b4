"""A teacher beside a classifier that is trained, through timm's distillation tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import DistillationTeacher, FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn

from ...data.classes import match_classes
from ...models.checkpoint import fixed_size, load_model
from ...released import variant_named
from ...run_folder import one_line
from ...training.recipe import Distillation


def open_teacher(source: str, image_size: int, in_chans: int = 3) -> Any:
    """Return a teacher, in eval mode without gradients.

    Args:
        source: The folder of a run, a checkpoint, ``hf-hub:user/name``, a variant whose released weights are there, or a model
            of timm with its pretrained weights.
        image_size: Side of the images that it will see.
        in_chans: Their channels.

    Raises:
        ValueError: If there is none, it cannot be read, or does not take images of this size.
    """
    try:
        if Path(source).exists() or source.startswith("hf-hub:") or variant_named(source):
            teacher = load_model(source)
        elif timm.is_model(source):
            teacher = timm.create_model(source, pretrained=True, **fixed_size(source, image_size))
        else:
            raise ValueError("no such run, checkpoint file or model of timm")
        teacher = teacher.eval().requires_grad_(False)
        with torch.no_grad():
            teacher(torch.zeros(1, in_chans, image_size, image_size))
    except Exception as error:  # no such file, no weights, no network, another size of images
        raise ValueError(f"distill.teacher {source}: {one_line(error)}") from error
    return teacher


class _Teacher(DistillationTeacher):
    """Gives the logits of the student's classes, in its order."""

    def __init__(self, model: nn.Module, places: list[int]) -> None:
        super().__init__(model)
        self.places = places
        self.eval()

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        given: Tensor = super().forward(input, return_features)
        return given if return_features else given[:, self.places]


def distillation(
    settings: Distillation,
    teacher: Any,
    student: nn.Module,
    criterion: Any,
    class_names: Sequence[str],
) -> Any:
    """Return timm's task: from images and targets to the loss of the labels and of what the teacher says.

    Args:
        settings: The recipe's.
        teacher: From `open_teacher`.
        student: Is trained.
        criterion: Takes logits (B, classes) and targets and returns their loss.
        class_names: Of the student. For logits they are matched with the teacher's by name; a teacher without names must have
            as many classes.

    Raises:
        ValueError: If the teacher does not know the classes, or has no features of one vector for an image.
    """
    where = f"distill.teacher {settings.teacher}"
    weights: dict[str, Any] = {
        "distill_loss_weight": settings.weight,
        "task_loss_weight": settings.label_weight,
        "verbose": False,
    }
    if settings.kind == "features":
        for name, model in ((where, teacher), ("the model", student)):
            if not hasattr(model, "forward_head"):
                raise ValueError(f"{name}: a {type(model).__name__} has no features before its classifier: use kind logits")
        return FeatureDistillationTask(student, _Teacher(teacher, []), criterion, **weights)
    names = list(teacher.pretrained_cfg.get("label_names") or [])
    if not names and teacher.num_classes != len(class_names):
        raise ValueError(
            f"{where}: has {teacher.num_classes} classes without names and the data {len(class_names)}, expected as many: "
            "teach features (--distill.kind features), or fine-tune the teacher on this data first"
        )
    try:
        places = match_classes(names or class_names, class_names, "the data")
    except ValueError as error:
        raise ValueError(f"{where}: {error}, or teach features (--distill.kind features)") from error
    return LogitDistillationTask(student, _Teacher(teacher, places), criterion, temperature=settings.temperature, **weights)
