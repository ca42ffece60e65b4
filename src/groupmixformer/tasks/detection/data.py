"""Data sets with objects, in COCO's form whatever their format: checked before training, turned into samples."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.annotations import Annotations, as_rle
from ...data.channels import AnyImage, ChannelImage, Channels, in_colour
from ...data.formats import TAKEN_WHOLE, WHOLE, recognise
from ...data.samples import Samples
from ...data.split import TRAIN, Splitter
from ...visual.drawing import draw_objects, to_image


class CocoImages(Samples):
    """The images of one split with their objects.

    Training samples are (image (C, H, W) in 0 to 1, target, problem); the target holds boxes (N, 4) as x1, y1, x2, y2 in
    pixels, labels (N) from 1 on, and if asked for masks (N, H, W), and keypoints (N, K, 3) as x, y and visibility (0: not
    annotated). Crowds are left out of training, as is usual, and objects that make no sense out of everything; images without
    objects stay. Evaluation samples are (image, id of the image, problem); a blank has none.

    Args:
        folder: Holds annotations and images, in any format of `groupmixformer.data.formats` that has objects.
        split: train, val or another.
        masks: Whether objects need masks.
        keypoints: Whether they need keypoints; none to take them where they are annotated.
        transform: From (image, target) to the two augmented; none for evaluation.
        seed: Of the augmentation.
        or_whole: Whether a data set that is not split is taken whole.
        splitter: Deals out the images of a data set that is not split.
        channels: How images are read.

    Attributes:
        class_names: Names of the categories, in the order of their ids; label k is the (k - 1)th.
        category_ids: Their ids, in the same order.
        keypoint_names: Of the keypoints; skeleton and mirrored are as in `Annotations`.
        skipped: A line for each image that is left out: missing, unreadable, or of another size than annotated.
        dropped: A line for each object that is left out: without area, outside of the image, of no category.
        ground_truth: COCO's annotations of what is left, for the evaluation.

    Raises:
        ValueError: If the annotations cannot be used.
    """

    fewest_classes = 1  # beside the background

    def __init__(
        self,
        folder: str | Path,
        split: str,
        masks: bool,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        or_whole: bool = False,
        splitter: Splitter | None = None,
        channels: Channels | None = None,
        keypoints: bool | None = False,
    ) -> None:
        found = recognise(folder, "detection")
        self.channels = channels or Channels()
        part = found.undivided() if splitter else found.part(split, or_whole)
        read = Annotations(found, part, masks, self.channels, keypoints)
        self.annotations, self.folder = read.source, read.folder
        self.class_names, self.category_ids = read.class_names, read.category_ids
        self.keypoint_names, self.skeleton, self.mirrored = read.keypoint_names, read.skeleton, read.mirrored
        self.skipped, self.dropped, self.notes = read.skipped, read.dropped, read.notes
        self.notes += [TAKEN_WHOLE] if part == WHOLE != split and not splitter else []
        self.masks, self.transform, self.seed = masks, transform, seed
        usable, objects = read.images, read.objects
        if splitter:
            files = {image["file_name"]: self.folder / image["file_name"] for image in usable.values()}
            dealt = splitter(files, lambda: [{annotation["label"] for annotation in objects[key]} for key in usable])
            chosen = dealt.names(split)
            usable = {key: image for key, image in usable.items() if image["file_name"] in chosen}
            objects = {key: objects[key] for key in usable}
            self.skipped = self.skipped if split == TRAIN else []
        learnable = [annotation["label"] for row in objects.values() for annotation in row if not annotation["iscrowd"]]
        self._counts = np.bincount(np.array(learnable, dtype=np.int64), minlength=len(self.class_names) + 1)[1:].tolist()
        if not learnable:
            reason = f": {self.dropped[0]}" if self.dropped else ""
            reason += ": where there are boxes alone, take --detector.architecture retinanet" if masks else ""
            raise ValueError(
                f"{self.annotations}: holds no object {'with a mask ' if masks else ''}to learn or to find{reason}"
            )
        self.ground_truth: dict[str, Any] = {}
        if transform is None:
            self.ground_truth = {
                "images": list(usable.values()),
                "annotations": [annotation for row in objects.values() for annotation in row],
                "categories": self._categories(),
            }
        # As bytes: a worker that counts references to millions of objects would copy the memory that it shares.
        self._records = [json.dumps({**image, "objects": objects[key]}).encode() for key, image in usable.items()]

    def relabel(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Take the classes of a model; those that the annotations do not have get ids that stand for nothing."""
        super().relabel(names, places)
        ids: list[Any] = [("no category", name) for name in names]
        for place, category in zip(places, self.category_ids, strict=True):
            ids[place] = category
        self.category_ids = ids
        self.ground_truth["categories"] = self._categories()

    def _categories(self) -> list[dict[str, Any]]:
        keypoints = {"keypoints": self.keypoint_names} if self.keypoint_names else {}
        return [{"id": i, "name": n, **keypoints} for i, n in zip(self.category_ids, self.class_names, strict=True)]

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Return the number of objects of each class, without crowds."""
        return self._counts, "objects", []

    def __len__(self) -> int:
        return len(self._records)

    def files(self) -> list[Path]:
        """Return the image files."""
        return [self.folder / json.loads(record)["file_name"] for record in self._records]

    def drawn(self, index: int) -> Image.Image:
        """Draw the objects of an image, without crowds."""
        image, record = self.read(index)
        return self._drawn(in_colour(image), self.target(record))

    def drawn_sample(self, sample: tuple[Any, ...]) -> Image.Image:
        """Draw the objects of an augmented image."""
        return self._drawn(to_image(sample[0]), sample[1])

    def _drawn(self, image: Image.Image, target: Mapping[str, Tensor]) -> Image.Image:
        masks = {"masks": target["masks"].bool()} if "masks" in target else {}
        return draw_objects(image, {**target, **masks}, self.class_names, self.skeleton)

    def read(self, index: int) -> tuple[AnyImage, dict[str, Any]]:
        """Return an image and its annotations.

        Raises:
            ValueError: If it cannot be read.
        """
        record = json.loads(self._records[index])
        return self.channels.read(self.folder / record["file_name"]), record

    def target(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return boxes (N, 4), labels (N) and, if asked for, masks (N, H, W) and keypoints (N, K, 3), without crowds."""
        height, width = record["height"], record["width"]
        annotated = [annotation for annotation in record["objects"] if not annotation["iscrowd"]]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotated], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([self.place(annotation["label"] - 1) + 1 for annotation in annotated], dtype=torch.int64),
        }
        if self.masks:
            encoded = [as_rle(annotation["segmentation"], height, width) for annotation in annotated]
            masks = rle.decode(encoded) if encoded else np.zeros((height, width, 0), dtype=np.uint8)  # (H, W, N)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))))
        if self.keypoint_names:
            places = torch.tensor([annotation["keypoints"] for annotation in annotated], dtype=torch.float32)
            target["keypoints"] = places.reshape(-1, len(self.keypoint_names), 3)
        return target

    def for_training(self, content: tuple[AnyImage, dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment an image and its objects together."""
        assert self.transform is not None
        image, record = content
        target = self.target(record)
        if self.mirrored is None:
            return self.transform(image, target)
        # Flips move keypoints, and turn left ones into right ones: three points tell whether the image is a mirror image.
        size = (record["height"], record["width"])
        places, target["visible"] = target["keypoints"].split([2, 1], dim=2)
        target["keypoints"] = tv_tensors.KeyPoints(places, canvas_size=size)
        target["frame"] = tv_tensors.KeyPoints([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], canvas_size=size)
        image, target = self.transform(image, target)
        origin, *axes = target.pop("frame")
        keypoints = torch.cat([target["keypoints"], target.pop("visible")], dim=2)
        is_mirrored = torch.stack([axis - origin for axis in axes]).det() < 0
        return image, {**target, "keypoints": keypoints[:, self.mirrored] if is_mirrored else keypoints}

    def for_evaluation(self, content: tuple[AnyImage, dict[str, Any]] | None) -> tuple[Tensor, Any]:
        """Give the image and its id."""
        if content is None:
            return torch.zeros(self.channels.count, 32, 32), None
        return to_tensor(content[0]), content[1]["id"]


def to_tensor(image: AnyImage) -> Tensor:
    """From an image to (C, H, W), of colours in 0 to 1."""
    if isinstance(image, ChannelImage):
        return image.tensor
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def detection_transform(hflip: float, vflip: float, color_jitter: float) -> Callable[[Any, Any], tuple[Any, Any]]:
    """From an image and its target to the two augmented, colours of images read as colour alone; small objects are left out.

    Images with keypoints are flipped only where their target has a frame, by which it is seen that they were.
    """
    recolour = v2.Compose([v2.ToImage(), *([v2.ColorJitter(*[color_jitter] * 3)] if color_jitter else [])])
    flip = v2.Compose([v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)])
    steps = [v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=_by_object)]
    return partial(_augmented, recolour, flip, v2.Compose([*steps, v2.ToPureTensor()]))


def _by_object(sample: tuple[Any, Mapping[str, Tensor]]) -> list[Tensor]:
    return [value for name, value in sample[1].items() if name in ("labels", "keypoints", "visible")]


def _augmented(recolour: Any, flip: Any, follow: Any, image: AnyImage, target: Any) -> tuple[Any, Any]:
    seen = (tv_tensors.Image(image.tensor), target) if isinstance(image, ChannelImage) else recolour(image, target)
    return follow(*(seen if "keypoints" in target and "frame" not in target else flip(*seen)))


def collate_detection(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Tensor], list[Any], list[str]]:
    """Make a batch of lists, since images differ in size: images, targets (or ids), and the problems there were."""
    images, targets, problems = zip(*samples, strict=True)
    return list(images), list(targets), [line for problem in problems for line in problem.splitlines()]
