"""A detector as an ONNX file, run and compared with the model before it gets its name, as other networks are."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torchvision.transforms.v2 import functional as F

from ..data.channels import AnyImage
from ..files import atomic_write, to_json
from ..models.fuse import fuse
from .export import NAME, first_line, quietly, with_channels

OPSET = 18  # of ONNX: the last that PyTorch's tracing exporter writes whole; the other cannot follow non-maximum suppression
TOLERANCE = 1e-3  # of boxes, relative to the image's larger side; of scores; of the share of an image's pixels in a mask
# Rounding decides whether an object at the limit of an overlap or of a list is kept: so many may have no counterpart.
STRAYS = 0.05
SIZES = ((97, 129), (160, 224))  # to compare at, beside the image's own


def _resize(transform: Any, image: Tensor, target: None) -> tuple[Tensor, None]:
    """Do what torchvision's transform does, to the same size: its own traced form rounds in another precision."""
    sides = shape_as_tensor(image)[-2:].double()
    limits = torch.tensor([transform.min_size[-1], transform.max_size], dtype=torch.float64)
    scale = (limits / torch.stack([sides.min(), sides.max()])).min()
    height, width = (sides * scale).floor().long()
    return nn.functional.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0], None


class ExportedDetector(nn.Module):
    """What a file holds: an image (C, height, width), colours in 0 to 1, to boxes, labels, scores, and masks or keypoints."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.names = ["boxes", "labels", "scores", *(["masks"] if self.network.masks else [])]
        self.names += ["keypoints", "keypoints_scores"] if self.network.keypoints else []

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (N, 4) as x1, y1, x2, y2 in pixels, (N) from 1 on, (N), and masks (N, 1, height, width) of probabilities.

        Or keypoints (N, K, 3), as x, y and 1, and the heights (N, K) of their heat maps.
        """
        found = self.network([image])[0]
        return tuple(found[name] for name in self.names)


def unlike(got: Sequence[Tensor], expected: Sequence[Tensor], least: float, most: int) -> Tensor:
    """Compare two lists of objects, each object with the nearest of its class in the other list.

    Args:
        got: Boxes (N, 4), labels (N), scores (N), and maybe masks (N, 1, H, W) or keypoints (N, K, 3) with their scores (N, K)
            that one program found.
        expected: Those of another (M, ...).
        least: Score from which on both list objects; one that is hardly above it may be missing.
        most: Length of a full list, where one that is hardly above the last may be missing too.

    Returns:
        The difference of each object that was compared, as `TOLERANCE` counts it; infinity for one without a counterpart.
    """
    side = torch.cat([got[0].flatten(), expected[0].flatten(), torch.ones(1)]).max()
    differences = []
    for ours, theirs in ((got, expected), (expected, got)):
        floor = TOLERANCE + (theirs[2].min().item() if len(theirs[2]) == most else least)
        for i in (ours[2] > floor).nonzero()[:, 0].tolist():
            same = theirs[1] == ours[1][i]
            apart = (theirs[0][same] - ours[0][i]).abs().amax(dim=1) / side
            apart = apart.maximum((theirs[2][same] - ours[2][i]).abs())
            if len(ours) == 5:
                apart = apart.maximum((theirs[3][same] - ours[3][i]).abs().flatten(1).amax(dim=1) / side)
            elif len(ours) == 4:
                apart = apart.maximum(((theirs[3][same] >= 0.5) != (ours[3][i] >= 0.5)).flatten(1).float().mean(dim=1))
            differences.append(apart.nan_to_num(torch.inf).min().item() if len(apart) else torch.inf)
    return torch.tensor(differences)


def _write(network: ExportedDetector, image: Tensor, metadata: Mapping[str, str], path: Path) -> None:
    import onnx

    torch.onnx.export(
        network,
        (image,),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=network.names,
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


@torch.no_grad()
def export_detector(
    detector: nn.Module,
    path: str | Path,
    image: AnyImage,
    class_names: Sequence[str],
    progress: Callable[[str], None] = lambda line: None,
    channels: int = 3,
) -> dict[str, Any]:
    """Write the inference form of a detector, in float32 for a CPU, for one image of any size at a time, and compare.

    Args:
        detector: A `groupmixformer.tasks.detection.model.Detector` in eval mode. It is left as it is.
        path: The file; its folder is created if need be.
        image: A real one (RGB) to compare on; at best, one with objects.
        class_names: In the order of the labels, the first of which is 1.
        progress: Is told what is done.
        channels: Of the images that it takes.

    Returns:
        As `groupmixformer.deploy.export.export`; the errors are those of the objects within the tolerance, objects says how
        many were compared, and strays how many of them have no counterpart.

    Raises:
        ValueError: If the file finds other objects than the model; then nothing is left of it, and an earlier file of that name
            is kept.
        ModuleNotFoundError: If onnx or onnxruntime is missing.
        OSError: If the file cannot be written.
    """
    import onnxruntime

    path = Path(path)
    network, plain = ExportedDetector(fuse(detector)).eval(), ExportedDetector(detector).eval()
    inner = network.network.network  # torchvision's
    inner.transform.resize = partial(_resize, inner.transform)
    finder: Any = getattr(inner, "roi_heads", inner)
    limits = (finder.score_thresh, finder.detections_per_img)
    metadata = {
        "classes": to_json(list(class_names)),
        "layout": f"image: float32, ({channels}, height, width)" + (", RGB, from 0 to 1" if channels == 3 else ""),
        "outputs": to_json(network.names),
        "version": version(NAME),
    }
    pixels = with_channels(image, channels)
    with atomic_write(path) as folder, quietly():
        written = folder / path.name
        progress("writing ONNX")
        try:
            _write(network, pixels, metadata, written)
            session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
            errors, objects, strays = {}, 0, 0
            for size in dict.fromkeys([tuple(pixels.shape[1:]), *SIZES]):
                progress(f"comparing at {size[0]} x {size[1]}")
                differences = []
                for sample in (F.resize(pixels, list(size)), torch.rand(channels, *size)):
                    got = [torch.from_numpy(output) for output in session.run(None, {"image": sample.numpy()})]
                    differences.append(unlike(got, plain(sample), *limits))
                apart = torch.cat(differences)
                within = apart[apart <= TOLERANCE]
                objects, strays = objects + len(apart), strays + len(apart) - len(within)
                errors[f"{size[0]}x{size[1]}"] = within.max().item() if len(within) else 0.0
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: the detector cannot be written ({first_line(error)})") from error
        if strays > STRAYS * objects:
            raise ValueError(f"{path}: of {objects} objects {strays} differ between file and model, so it is removed")
        size_of_file = written.stat().st_size
    result = {
        "file": str(path),
        "format": "onnx",
        "bytes": size_of_file,
        "errors": errors,
        "objects": objects,
        "strays": strays,
    }
    return result | {"tolerance": TOLERANCE, "opset": OPSET, "metadata": metadata}
