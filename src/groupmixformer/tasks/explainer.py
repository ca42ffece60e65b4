"""A trained model of any task explains an image: what positions attend to, and what speaks for what it found."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..models.attention_maps import GROUP_SIZES, attend, by_group_size, class_relevance, relevance, stages_of, suited_stage
from ..models.checkpoint import task_of
from ..models.groupmixformer import GroupMixFormer
from ..visual.figures import Row, overlay_figure, shown
from .classification.predict import Classes, Point, Predicted, View

if TYPE_CHECKING:
    from .predictor import Objects, Segments  # which bring Lightning: only where a detector or segmenter is explained


@dataclass(frozen=True)
class Chosen:
    """What is explained.

    Attributes:
        about: For a JSON object: class, index and probability at least; empty if nothing was found.
        title: In two lines.
        relevance: (h, w) on the view's pixels.
        box: In the view: left, top, right, bottom.
    """

    about: dict[str, Any]
    title: str = ""
    relevance: NDArray[np.float32] | None = None
    box: list[float] | None = None


def _index(class_names: Sequence[str], wanted: str) -> int:
    """Return the number of a class that is named, or given by its number."""
    if wanted in class_names:
        return class_names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(class_names):
        return int(wanted)
    near = get_close_matches(wanted, class_names, n=1, cutoff=0.0)[0]
    raise ValueError(f"no class {wanted}, expected a name or a number from 0 to {len(class_names) - 1}: the nearest is {near}")


class Explainer(ABC):
    """A trained network that explains images.

    Attributes:
        backbone: The GroupMixFormer in it, if it has one.
        stages: Stages 0 to 3 whose relevance can be shown, with the place of their features.
    """

    backbone: GroupMixFormer | None
    stages: dict[int, int]

    @abstractmethod
    def see(self, image: Image.Image) -> View:
        """Prepare an image (RGB)."""

    @abstractmethod
    def choose(self, image: Image.Image, view: View, stage: int, point: Point | None) -> Chosen:
        """Find what to explain, and its relevance for a stage; a query (y, x) in the original image may decide what."""

    def explain(
        self, image: Image.Image, queries: Sequence[Point] = (), stages: Sequence[int] = (), form: str = "png"
    ) -> Predicted:
        """Explain an image (RGB).

        Args:
            image: RGB.
            queries: Pixels (y, x) of the image; by default the one of greatest relevance, or the centre where there is none.
            stages: Stages of the attention maps, the last of them also that of the relevance; by default the deepest with at
                least 4 tokens along each side, up to 2 for attention and 3 for relevance.
            form: Of the figure: png, svg or pdf.

        Returns:
            With the figure and the arrays as files.

        Raises:
            ValueError: If a query, stage, class or object does not exist.
        """
        view = self.see(image)
        points = [view.seen(query) for query in queries]
        last = max(stages) if stages else suited_stage(view.size, self.stages)
        if last not in self.stages:
            raise ValueError(f"got stage {last}, expected one of {', '.join(map(str, self.stages))}")
        chosen = self.choose(image, view, last, queries[0] if queries else None)
        speaks = chosen.relevance is not None and bool(chosen.relevance.any())
        origin = "given" if queries else "relevance" if speaks else "centre"
        if not queries:
            at = int(np.argmax(chosen.relevance)) if speaks and chosen.relevance is not None else None
            middle = (view.size[0] // 2, view.size[1] // 2)
            points = [middle if at is None else divmod(at, view.size[1])]
            queries = [view.unseen(points[0])]
        result: dict[str, Any] = {
            **chosen.about,
            "relevance_stage": last,
            "relevant": speaks,
            "queries": [list(query) for query in queries],
            "queries_from": origin,
        }
        arrays: dict[str, Any] = {
            "image": view.pixels,
            "queries": np.array(queries),
            "queries_seen": np.array(points),
            "group_sizes": np.array(GROUP_SIZES),
        }
        if chosen.relevance is not None:
            arrays |= {"relevance": chosen.relevance, "relevance_stage": np.array(last)}
            arrays |= {name: np.array(chosen.about[name]) for name in ("class", "index", "probability")}
        strengths: dict[int, Tensor] = {}
        if self.backbone is not None:
            wanted = sorted(stages) or [suited_stage(view.size, range(min(3, len(self.backbone.stages))))]
            with torch.inference_mode():
                found = attend(self.backbone, view.images, points, wanted)
            for stage, attention in found.items():
                maps = attention.maps[0]
                height, width = view.size
                strengths[stage] = by_group_size(maps, view.images.shape[-2:])[..., :height, :width].cpu()
                arrays |= {
                    f"maps_stage{stage}": maps.cpu().numpy(),
                    f"local_stage{stage}": attention.local[0].cpu().numpy(),
                    f"constant_stage{stage}": attention.constant[0].cpu().numpy(),
                }
        result["stages"] = list(strengths)

        figure = self._draw(view, queries, points, chosen, strengths)
        drawn, packed = io.BytesIO(), io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "groupmixformer"}):  # the same file from the same image
            figure.savefig(drawn, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
        np.savez_compressed(packed, **arrays)
        # The names differ from that of the image, which may lie in the same folder.
        files = {f"-explained.{form}": drawn.getvalue(), "-explained.npz": packed.getvalue()}
        return Predicted(result, self._text(result), files, [])

    @staticmethod
    def _draw(
        view: View, queries: Sequence[Point], points: Sequence[Point], chosen: Chosen, strengths: dict[int, Tensor]
    ) -> Figure:
        """Draw a row for each query and stage; the first has the relevance."""
        image = shown(view.pixels)
        rows = [
            Row(image, f"query {query[0]}, {query[1]}\nstage {stage}", point, strengths=overlaid[i].numpy())
            for i, (query, point) in enumerate(zip(queries, points, strict=True))
            for stage, overlaid in strengths.items()
        ]
        first, *others = rows or [Row(image)]  # without maps, of another backbone, a query shows nothing
        rows = [replace(first, box=chosen.box, relevance=chosen.relevance), *others]
        return overlay_figure(rows, "query marked" if strengths else "image", chosen.title)

    @staticmethod
    def _text(result: dict[str, Any]) -> str:
        if "class" not in result:
            return "nothing found, so there is no relevance"
        text = f"{result['class']} {result['probability']:.1%}"
        if not result["relevant"]:
            stage = result["relevance_stage"]
            return f"{text}, for which nothing speaks in stage {stage}: its relevance is zero, another --stage may show more"
        row, column = result["queries"][0]
        return f"{text}, most relevant at {row},{column}" if result["queries_from"] == "relevance" else text


class OfClasses(Explainer):
    """Explains a class of a classifier: one that is named, or the likeliest."""

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None, wanted: str | None) -> None:
        self.classes = Classes(run, device, image_size)
        model = self.classes.model
        self.backbone = model if isinstance(model, GroupMixFormer) else None
        self.stages = stages_of(model)
        self.wanted = None if wanted is None else _index(self.classes.class_names, wanted)

    def see(self, image: Image.Image) -> View:
        """Prepare an image by timm's transform."""
        return self.classes.view(image)

    def choose(self, image: Image.Image, view: View, stage: int, point: Point | None) -> Chosen:
        """Weigh the class."""
        classes = None if self.wanted is None else [self.wanted]
        found, logits = class_relevance(self.classes.model, view.images, classes, stage)
        index = int(logits.argmax()) if self.wanted is None else self.wanted
        name, probability = self.classes.class_names[index], logits[0].float().softmax(dim=0)[index].item()
        about = {"class": name, "index": index, "probability": probability}
        return Chosen(about, f"relevance, stage {stage}:\n{name} ({probability:.1%})", found[0].float().cpu().numpy())


class _OfScenes(Explainer):
    """Explains with a network over a backbone of timm."""

    def __init__(self, scenes: "Objects | Segments") -> None:
        self.scenes, self.model = scenes, scenes.model
        body = self.model.body
        network = getattr(body, "model", None)
        self.backbone = network if isinstance(network, GroupMixFormer) else None
        if getattr(body, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(f"{self.model.backbone.name} gives features as {body.output_fmt}, expected NCHW: not explained")
        self.stages = stages_of(body)

    def _run(self, batch: Any) -> tuple[Any, list[Tensor]]:
        """Return what the network gives, and the features of its backbone that it was computed from."""
        features: list[Tensor] = []
        # torchvision and segmentation_models_pytorch call the backbone themselves and keep what it gives.
        hook = self.model.body.register_forward_hook(lambda module, inputs, output: features.extend(output))
        try:
            with torch.enable_grad():
                return self.model(batch), features
        finally:
            hook.remove()

    def _view(
        self, image: Image.Image, images: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> View:
        """Return the view of which the first `size` pixels of normalised images are the image."""
        height, width = size
        colors = images[0, :, :height, :width].permute(1, 2, 0).cpu() * torch.tensor(std) + torch.tensor(mean)
        pixels = (255 * colors.clamp(0, 1)).round().to(torch.uint8).numpy()
        original = (image.height, image.width)
        return View(images, pixels, original, (height / original[0], width / original[1]))

    def _weigh(self, score: Tensor, features: Sequence[Tensor], view: View, stage: int) -> NDArray[np.float32]:
        found = relevance(score, features[self.stages[stage]], view.images.shape[-2:], view.size)
        return np.asarray(found[0].float().cpu())


class OfObjects(_OfScenes):
    """Explains an object that a detector finds: by its number, or the nearest to the first query, or the best."""

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None, wanted: int | None) -> None:
        from .predictor import Objects

        super().__init__(Objects(run, device, image_size, None))
        self.wanted = wanted

    def see(self, image: Image.Image) -> View:
        """Resize the image as torchvision does."""
        from .detection.data import to_tensor

        transform = self.model.network.transform
        seen, _ = transform([to_tensor(image).to(self.scenes.device)])
        return self._view(image, seen.tensors, seen.image_sizes[0], transform.image_mean, transform.image_std)

    def choose(self, image: Image.Image, view: View, stage: int, point: Point | None) -> Chosen:
        """Weigh the score of the object."""
        from .detection.data import to_tensor

        (found,), features = self._run([to_tensor(image).to(self.scenes.device).requires_grad_()])
        boxes, scores = found["boxes"].detach().cpu(), found["scores"].detach().cpu()
        if self.wanted is not None:
            if self.wanted >= len(scores):
                last = f", expected 0 to {len(scores) - 1}" if len(scores) else ""
                raise ValueError(f"got object {self.wanted}, and {len(scores)} were found{last}")
            number = self.wanted
        elif len(scores) and point is not None:
            sure = max(1, int((scores >= 0.5).sum()))  # those that gmf predict shows, the best if there is none
            x, y = point[1] + 0.5, point[0] + 0.5
            left, top, right, bottom = boxes[:sure].unbind(dim=1)
            away = torch.hypot(torch.relu(torch.maximum(left - x, x - right)), torch.relu(torch.maximum(top - y, y - bottom)))
            areas = (right - left) * (bottom - top)
            number = min(range(sure), key=lambda i: (away[i].item(), areas[i].item()))
        elif len(scores):
            number = 0
        else:
            return Chosen({"objects": 0})
        label, probability = int(found["labels"][number]), scores[number].item()
        name, box = self.scenes.class_names[label - 1], boxes[number].tolist()
        about = {"class": name, "index": label - 1, "probability": probability}
        about |= {"object": number, "objects": len(scores), "box": box}
        values = self._weigh(found["scores"][number], features, view, stage)
        height, width = view.factors
        seen = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
        return Chosen(about, f"relevance, stage {stage}:\nobject {number}, {name} ({probability:.1%})", values, seen)


class OfSegments(_OfScenes):
    """Explains the segment of a class: one that is named, that of the pixel at the first query, or the largest."""

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None, wanted: str | None) -> None:
        from .predictor import Segments

        super().__init__(Segments(run, device, image_size, None))
        self.wanted = None if wanted is None else _index(self.scenes.class_names, wanted)

    def see(self, image: Image.Image) -> View:
        """Resize the image as the segmenter does, and fill it up."""
        from .segmentation.training import STRIDE

        prepared = self.model.prepare(image)[None].to(self.scenes.device)
        height, width = prepared.shape[-2:]
        images = F.pad(prepared, (0, -width % STRIDE, 0, -height % STRIDE))
        return self._view(image, images, (height, width), self.model.mean, self.model.std)

    def choose(self, image: Image.Image, view: View, stage: int, point: Point | None) -> Chosen:
        """Weigh the logits of the class where it is the likeliest."""
        height, width = view.size
        logits, features = self._run(view.images[..., :height, :width].detach().requires_grad_())
        probabilities = logits[0].detach().float().softmax(dim=0)
        labels = probabilities.argmax(dim=0)
        if self.wanted is not None:
            index = self.wanted
        elif point is not None:
            index = int(labels[view.seen(point)])
        else:
            index = int(labels.flatten().bincount().argmax())
        segment = labels == index
        name, share = self.scenes.class_names[index], segment.float().mean().item()
        probability = probabilities[index][segment].mean().item() if share else 0.0
        about = {"class": name, "index": index, "probability": probability, "share": share}
        values = self._weigh(logits[0, index][segment].sum(), features, view, stage)
        return Chosen(about, f"relevance, stage {stage}:\n{name} ({probability:.1%})", values)


def open_explainer(
    run: str | Path,
    device: torch.device,
    image_size: int | None = None,
    wanted_class: str | None = None,
    wanted_object: int | None = None,
) -> Explainer:
    """Open a run of any task to explain images.

    Args:
        run: Folder of a run, or for classifiers what `load_model` reads.
        device: To run on.
        image_size: Side of the images; the model's own by default.
        wanted_class: Name or number of the class to explain, for classifiers and segmenters.
        wanted_object: Number of the object to explain, for detectors.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read, or the class does not exist.
    """
    task = task_of(run)
    if task == "detection":
        return OfObjects(run, device, image_size, wanted_object)
    if task == "segmentation":
        return OfSegments(run, device, image_size, wanted_class)
    return OfClasses(run, device, image_size, wanted_class)
