"""A trained model of any task explains an image: what positions attend to, and what speaks for what it found."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.channels import AnyImage, Channels
from ..files import short
from ..models.attention_maps import GROUP_SIZES, attend, by_group_size, has_attention_maps, relevance, stages_of, suited_stage
from ..models.groupmixformer import GroupMixFormer
from .predictor import Point, Predicted, Predictor, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # which a prediction does without


@dataclass(frozen=True)
class Target:
    """What is explained.

    Attributes:
        about: For a JSON object: class, index and probability at least; empty if nothing was found.
        relevance: (h, w) on the view's pixels.
        box: In the view: left, top, right, bottom.
    """

    about: dict[str, Any]
    relevance: NDArray[np.float32] | None = None
    box: list[float] | None = None


def class_index(class_names: Sequence[str], wanted: str) -> int:
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
    predictor: Predictor

    @property
    def channels(self) -> Channels:
        """How images are read for it."""
        return self.predictor.channels

    @abstractmethod
    def view(self, image: AnyImage) -> View:
        """Prepare an image."""

    @abstractmethod
    def choose(self, image: AnyImage, view: View, stage: int, point: Point | None) -> Target:
        """Find what to explain, and its relevance for a stage; a query (y, x) in the original image may decide what."""

    def explain(
        self, image: AnyImage, queries: Sequence[Point] = (), stages: Sequence[int] = (), form: str = "png"
    ) -> Predicted:
        """Explain an image.

        Args:
            image: As `channels` of the predictor reads it.
            queries: Pixels (y, x) of the image; by default the one of greatest relevance, or the centre where there is none.
            stages: Stages of the attention maps, the last of them also that of the relevance; by default the deepest with at
                least 4 tokens along each side, up to 2 for attention and 3 for relevance.
            form: Of the figure: png, svg or pdf.

        Returns:
            With the figure and the arrays as files.

        Raises:
            ValueError: If a query, stage, class or object does not exist.
        """
        view = self.view(image)
        points = [view.to_input(query) for query in queries]
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
            queries = [view.to_original(points[0])]
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

        from ..visual.figures import drawn

        figure, packed = self._draw(view, queries, points, chosen, strengths, last), io.BytesIO()
        np.savez_compressed(packed, **arrays)
        # The names differ from that of the image, which may lie in the same folder.
        files = {f"-explained.{form}": drawn(figure, form, dpi=200), "-explained.npz": packed.getvalue()}
        return Predicted(result, self._text(result), files, [])

    @staticmethod
    def _draw(
        view: View, queries: Sequence[Point], points: Sequence[Point], chosen: Target, strengths: dict[int, Tensor], last: int
    ) -> "Figure":
        """Draw a row for each query and stage; the first has the relevance."""
        from ..visual.figures import Row, overlay_figure, shown

        image = shown(view.pixels)
        rows = [
            Row(image, f"query {query[0]}, {query[1]}\nstage {stage}", point, strengths=overlaid[i].numpy())
            for i, (query, point) in enumerate(zip(queries, points, strict=True))
            for stage, overlaid in strengths.items()
        ]
        first, *others = rows or [Row(image)]  # without maps, of another backbone, a query shows nothing
        rows = [replace(first, box=chosen.box, relevance=chosen.relevance), *others]
        title, about = f"relevance, stage {last}", chosen.about
        if "class" in about:
            number = f"object {about['object']}, " if "object" in about else ""
            title += f":\n{number}{short(about['class'])} ({about['probability']:.1%})"
        return overlay_figure(rows, "query marked" if strengths else "image", title)

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


class BackboneExplainer(Explainer):
    """Explains with a `BackboneModel`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.model = predictor, predictor.model
        features = self.model.features
        network = getattr(features, "model", None)
        self.backbone = network if has_attention_maps(network) else None
        if getattr(features, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(
                f"{self.model.backbone.name} gives features as {features.output_fmt}, expected NCHW: not explained"
            )
        self.stages = stages_of(features)

    def _run(self, batch: Any) -> tuple[Any, list[Tensor]]:
        """Return what the network gives, and the features of its backbone that it was computed from."""
        features: list[Tensor] = []
        # torchvision and segmentation_models_pytorch call the backbone themselves and keep what it gives.
        hook = self.model.features.register_forward_hook(lambda module, inputs, output: features.extend(output))
        try:
            with torch.enable_grad():
                return self.model(batch), features
        finally:
            hook.remove()

    def _view(
        self, image: AnyImage, images: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> View:
        """Return the view of which the first `size` pixels of normalised images are the image."""
        height, width = size
        seen = images[0, :, :height, :width]
        colors = seen.permute(1, 2, 0).cpu() * torch.tensor(std) + torch.tensor(mean)
        pixels = (255 * colors.clamp(0, 1)).round().to(torch.uint8).numpy()
        if not isinstance(image, Image.Image):
            pixels = self.predictor.channels.shown(seen, mean, std)
        original = (image.height, image.width)
        return View(images, pixels, original, (height / original[0], width / original[1]))

    def _weigh(self, score: Tensor, features: Sequence[Tensor], view: View, stage: int) -> NDArray[np.float32]:
        found = relevance(score, features[self.stages[stage]], view.images.shape[-2:], view.size)
        return np.asarray(found[0].float().cpu())
