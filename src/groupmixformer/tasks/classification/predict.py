"""A trained classifier, ready to look at images, to be measured and to explain what it sees."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.config import resolve_data_config
from torch import Tensor

from ...data.channels import AnyImage, Channels
from ...data.split import Splitter
from ...models.attention_maps import class_relevance, has_attention_maps, stages_of
from ...models.checkpoint import load_model
from ...run_folder import MULTI_LABEL, RunFolder
from ..explainer import Explainer, Target, class_index
from ..predictor import EvalResult, Point, Predicted, Predictor, Progress, View, class_table, no_better_than_one_class
from .data import eval_loader, eval_transform, open_images
from .metrics import Evaluation, Pass, evaluate_classifier, per_class, reliability
from .multi_label import THRESHOLD, LabelEvaluation, evaluate_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def data_config(model: Any, image_size: int | None = None, test_size: bool = False, **crop: Any) -> dict[str, Any]:
    """Size, crop and colours of the model's input by timm's rules: what is asked for, or else what is stored with the model."""
    asked = {"img_size": image_size, "in_chans": model.pretrained_cfg["input_size"][0], **crop}
    config: dict[str, Any] = resolve_data_config(asked, model.pretrained_cfg, use_test_size=test_size)
    return config


def class_names(model: Any) -> list[str]:
    """Names stored with the model; ImageNet's where there are 1,000 classes; numbers otherwise."""
    names = list(model.pretrained_cfg.get("label_names") or [])
    if not names and model.num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(index) for index in range(1000)]
    return names or [str(index) for index in range(model.num_classes)]


@dataclass(frozen=True)
class ClassificationResult(EvalResult):
    """What an evaluation of a classifier found; `evaluation` has it image by image."""

    evaluation: Evaluation | None = None

    def figure(self) -> "Figure":
        """Draw the reliability diagram."""
        from .report import reliability_diagram

        assert self.evaluation is not None
        return reliability_diagram(self.evaluation)


@dataclass(frozen=True)
class LabelResult(EvalResult):
    """What an evaluation of several labels for an image found."""

    evaluation: LabelEvaluation | None = None
    positions: Tensor | None = None

    def figure(self) -> "Figure":
        """Draw F1 over the threshold."""
        from .report import threshold_chart

        assert self.evaluation is not None
        return threshold_chart(self.evaluation)


class ClassificationPredictor(Predictor):
    """A classifier.

    Options are ``top``, the number of classes to name, or ``score_threshold``, the least probability of a label that an image
    is said to have, where it may have several; ``test_size``, to take size and crop that the model stores for tests, if
    any; and ``crop_pct``, ``crop_mode`` and ``interpolation`` by timm's names, where they are not the model's own.

    Attributes:
        config: Size, crop and colours of the model's input.
        several: Whether an image may have several labels.
        transform: From an image to the model's input (C, H, W).
    """

    batched = True
    metric = ("val_top1", "top-1")

    DEFAULTS: ClassVar = {
        **{"top": None, "score_threshold": None, "test_size": False},
        **{"crop_pct": None, "crop_mode": None, "interpolation": None},
    }
    OWN: ClassVar = {True: ("score_threshold", THRESHOLD, "top"), False: ("top", 5, "score_threshold")}  # by `several`

    def load(self, run: RunFolder, image_size: int | None) -> tuple[Any, dict[str, Any]]:
        """Return the classifier, and how images are prepared for it."""
        model = load_model(run)
        if not model.num_classes:
            raise ValueError(f"{run.source}: has no classes: train it on some: gmf train finetune --checkpoint {run.source}")
        self.class_names, self.has_names = class_names(model), bool(model.pretrained_cfg.get("label_names"))
        self.several = model.pretrained_cfg.get("problem_type") == MULTI_LABEL
        option, default, other = self.OWN[self.several]
        if self.options.pop(other) is not None:
            labels = "several labels" if self.several else "one class"
            raise ValueError(f"{run.source}: gives an image {labels}: take {option}, and not {other}")
        self.metric = ("val_mAP", "mAP") if self.several else self.metric
        asked = {name: value for name, value in self.options.items() if name != option}
        self.options[option] = default if self.options[option] is None else self.options[option]
        config = data_config(model, image_size, **asked)
        self.transform: Any = eval_transform(config)
        self.channels = Channels.stored(model.pretrained_cfg, config["input_size"][0])
        return model, config

    def view(self, image: AnyImage) -> View:
        """Prepare an image, following the transform step by step to know where each pixel goes."""
        original, factors, offsets = (image.height, image.width), [1.0, 1.0], [0, 0]
        made: Any = image
        before, pixels = original, image
        for step in self.transform.transforms:
            made = step(made)
            after = (made.height, made.width) if isinstance(made, Image.Image) else made.shape[-2:]
            for i, (old, new) in enumerate(zip(before, after, strict=True)):
                if "Crop" in type(step).__name__:  # as torchvision and timm round
                    offsets[i] += (new - old) // 2 if new > old else -round((old - new) / 2)
                else:
                    factors[i] *= new / old
            before, pixels = after, made if isinstance(made, Image.Image) else pixels
        shown = np.asarray(pixels) if isinstance(pixels, Image.Image) else self.channels.shown(made, **self._statistics)
        return View(made[None].to(self.device), shown, original, (factors[0], factors[1]), (offsets[0], offsets[1]))

    @property
    def _statistics(self) -> dict[str, Any]:
        return {name: self.config[name] for name in ("mean", "std")}

    def frame(self, image: AnyImage) -> tuple[float, float, float, float]:
        """What the crop leaves."""
        return self.view(image).frame

    def prepare(self, image: AnyImage) -> Tensor:
        """From an image to the model's input (C, H, W)."""
        return self.transform(image)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the classes' probabilities (B, classes) on the CPU, of images (B, C, H, W) that `prepare` made."""
        with self.autocast():
            logits = self.model(images.to(self.device))
        return (logits.float().sigmoid() if self.several else logits.float().softmax(dim=1)).cpu()

    def predict_prepared(self, images: Tensor) -> list[Predicted]:
        """Name the likeliest classes, or the labels, of each image (B, C, H, W) that `prepare` made."""
        found = []
        for probabilities in self.probabilities(images):
            if self.several:
                number = int((probabilities >= self.options["score_threshold"]).sum())
                every = {"probabilities": dict(zip(self.class_names, probabilities.tolist(), strict=True))}
            else:
                number, every = min(self.options["top"], len(probabilities)), {}
            best = probabilities.topk(number)
            classes = [
                {"class": self.class_names[index], "index": index, "probability": probability}
                for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            text = ", ".join(f"{c['class']} {c['probability']:.1%}" for c in classes) or "no label"
            found.append(Predicted({"classes": classes, **every}, text, {}, []))
        return found

    def predict(self, image: AnyImage, name: str = "") -> Predicted:
        """Classify an image."""
        return self.predict_prepared(self.prepare(image)[None])[0]

    def open_data(self, data: str, root: str = "data", splitter: Splitter | None = None) -> Any:
        """Open the held-out part of a data set, or a folder of class folders.

        Args:
            data: As a recipe names it.
            root: Where timm's data sets lie.
            splitter: Says which images of a folder without parts are held out.

        Raises:
            ValueError: If there is no such data set, or the model lacks one of its classes, or is for another kind of labels.
        """
        images = open_images(data, root, need_train=False, splitter=splitter)
        if images.several != self.several:
            kinds = {True: "several labels for an image", False: "one class for each image"}
            raise ValueError(f"{data}: has {kinds[images.several]}, and the model gives {kinds[self.several]}")
        return self.match_classes(images.held_out(self.transform, self.channels), data)

    def evaluate(
        self, images: Any, workers: int = 0, progress: Progress = lambda items, _: items, batch_size: int = 64
    ) -> EvalResult:
        """Measure accuracy and calibration, or mAP and F1 of several labels, on every image once, in batches."""
        loader = progress(eval_loader(images, batch_size, workers), "evaluating")
        config = {key: self.config[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")}
        height, width = config["input_size"][1:]
        details = f"{height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, {config['interpolation']}"
        config |= {"device": str(self.device), "batch_size": batch_size}
        if self.several:
            labelled, looked = evaluate_labels(self.model, loader, self.dtype)
            return self._labels_result(labelled, looked, images, config, details)
        evaluation = evaluate_classifier(self.model, loader, self.dtype)
        metrics, classes = evaluation.metrics, per_class(evaluation, images.class_names)
        top5 = f"top-5 {metrics['top5']:.2%}  " if len(classes) > 5 else ""  # or it is 100 % whatever the model
        text = (
            f"top-1 {metrics['top1']:.2%}  {top5}loss {metrics['loss']:.4f}  "
            f"calibration error {metrics['calibration_error']:.2%}"
        )
        result = {**metrics, **config, "per_class": classes, "reliability": reliability(evaluation)}
        right, counts = int((evaluation.predicted == evaluation.true).sum()), [row["images"] for row in classes]
        remarks = no_better_than_one_class(right, counts, images.class_names, "images")
        table = class_table(classes, "top1", "top-1")
        return ClassificationResult(result, text, table, evaluation.problems, details, images.notes, remarks, evaluation)

    def _labels_result(
        self, found: LabelEvaluation, looked: Pass, images: Any, config: dict[str, Any], details: str
    ) -> LabelResult:
        metrics, rows = found.metrics, found.per_class(images.class_names)
        text = (
            f"mAP {metrics['mAP']:.2%}  F1 macro {metrics['f1_macro']:.2%}, micro {metrics['f1_micro']:.2%} at {THRESHOLD}, "
            f"micro {metrics['best_f1_micro']:.2%} at {metrics['best_threshold']:.2f}  loss {metrics['loss']:.4f}"
        )
        shares = [row["images"] / len(found.true) for row in rows if row["images"]]
        chance, remarks = float(np.mean(shares)) if shares else 0.0, []
        if metrics["mAP"] <= chance:
            remarks.append(
                f"no better than chance: random answers have an mAP of {chance:.2%}, and the model {metrics['mAP']:.2%}"
            )
        named = (
            2 * found.true.sum().item() / (found.true.sum().item() + found.true.numel())
        )  # F1 of every label for every image
        if metrics["best_f1_micro"] <= named + 1e-9:
            remarks.append(f"no better than naming every label for every image, which has a micro F1 of {named:.2%}")
        if not metrics["f1_micro"]:
            best = f"F1 is best, {metrics['best_f1_micro']:.2%}, at {metrics['best_threshold']:.2f}"
            remarks.append(f"no label is found rightly at a threshold of {THRESHOLD}: {best}: take --score-threshold")
        result = {**metrics, **looked.counts, **config, "per_class": rows}
        table = class_table(rows, "AP")
        return LabelResult(result, text, table, looked.problems, details, images.notes, remarks, found, looked.positions)

    def report(self, folder: Path, images: Any, measured: EvalResult) -> Path:
        """Write the report of a run, with confusion, calibration, examples right and wrong, and what they attend to."""
        from .report import write_label_report, write_report

        if isinstance(measured, LabelResult):
            return write_label_report(folder, self.model.cpu(), images, self.class_names, measured, self.config)
        assert isinstance(measured, ClassificationResult)
        return write_report(folder, self.model.cpu(), images, self.class_names, measured, self.config)

    def save_examples(self, folder: Path, images: Any) -> list[Path]:
        """Write held-out images of different classes."""
        from .report import save_examples

        return save_examples(folder, images, self.class_names)


class ClassificationExplainer(Explainer):
    """Explains a class of a classifier: one that is named, or the likeliest."""

    def __init__(
        self, run: str | Path | RunFolder, device: torch.device, image_size: int | None = None, wanted_class: str | None = None
    ) -> None:
        self.predictor: ClassificationPredictor = ClassificationPredictor(run, device, image_size)
        model = self.predictor.model
        self.backbone = model if has_attention_maps(model) else None
        self.stages = stages_of(model)
        self.wanted = None if wanted_class is None else class_index(self.predictor.class_names, wanted_class)

    def view(self, image: AnyImage) -> View:
        """Prepare an image by timm's transform."""
        return self.predictor.view(image)

    def choose(self, image: AnyImage, view: View, stage: int, point: Point | None) -> Target:
        """Weigh the class."""
        classes = None if self.wanted is None else [self.wanted]
        found, logits = class_relevance(self.predictor.model, view.images, classes, stage)
        index = int(logits.argmax()) if self.wanted is None else self.wanted
        scores = logits[0].float().sigmoid() if self.predictor.several else logits[0].float().softmax(dim=0)
        name, probability = self.predictor.class_names[index], scores[index].item()
        about = {"class": name, "index": index, "probability": probability}
        return Target(about, found[0].float().cpu().numpy())
