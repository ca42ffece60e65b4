"""COCO's results and its metrics of boxes, masks and keypoints."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor

# What COCO's own evaluation prints, in its order: average precision at 0.50:0.95, 0.50 and 0.75, for small (below 32 x 32
# pixels), medium and large (above 96 x 96) objects; average recall with 1, 10 and 100 objects an image, and by size.
COCO_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")

Kind = Literal["bbox", "segm", "keypoints"]


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Return COCO's run-length encodings of masks (N, H, W) of booleans."""
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))  # (H, W, N), as COCO has them
    encoded = rle.encode(columns) if masks.shape[0] else []
    return [
        {"size": list(e["size"]), "counts": e["counts"].decode() if isinstance(e["counts"], bytes) else e["counts"]}
        for e in encoded
    ]


def to_results(detections: Mapping[str, Tensor], image_id: Any, category_ids: Sequence[Any]) -> list[dict[str, Any]]:
    """Turn what a detector found in one image into COCO's results.

    Args:
        detections: Boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N) from 1 on, scores (N), and maybe masks (N, 1, H, W) of
            probabilities, or keypoints (N, K, 3) with keypoints_scores (N, K).
        image_id: Of the image.
        category_ids: Id of each label.
    """
    boxes = detections["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    ]
    if "masks" in detections:
        for result, mask in zip(results, encode(detections["masks"][:, 0] >= 0.5), strict=True):
            result["segmentation"] = mask
    if "keypoints" in detections:
        places = torch.cat([detections["keypoints"][..., :2], detections["keypoints_scores"][..., None]], dim=2)
        for result, keypoints in zip(results, places.double().flatten(1).tolist(), strict=True):
            result["keypoints"] = keypoints
    return results


def restrict(ground_truth: Mapping[str, Any], ids: Container[Any]) -> dict[str, Any]:
    """Return COCO's annotations of some images: those that could be read."""
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in ids],
        "annotations": [annotation for annotation in ground_truth["annotations"] if annotation["image_id"] in ids],
    }


QUIET = {"print_function": lambda *_: None}


def _as_coco(ground_truth: Mapping[str, Any], results: Iterable[Mapping[str, Any]], kind: Kind) -> tuple[COCO, COCO]:
    """Return what is expected and what was found as the library takes it; categories are numbered by label."""
    # The library takes numbers only; those of images decide between equal scores, so they are in the order of the ids.
    images = {key: number for number, key in enumerate(sorted(image["id"] for image in ground_truth["images"]), start=1)}
    labels = {category["id"]: label for label, category in enumerate(ground_truth["categories"], start=1)}

    def numbered(record: Mapping[str, Any]) -> dict[str, Any]:
        return {**record, "image_id": images[record["image_id"]], "category_id": labels[record["category_id"]]}

    expected = COCO(
        {
            "images": [{**image, "id": images[image["id"]]} for image in ground_truth["images"]],
            "annotations": [numbered(annotation) for annotation in ground_truth["annotations"]],
            "categories": [{**category, "id": labels[category["id"]]} for category in ground_truth["categories"]],
        },
        **QUIET,
    )
    # The library takes the first of these that a result has, and its area.
    left_out = {"bbox", "segmentation", "keypoints"} - {"segmentation" if kind == "segm" else kind}
    found = [numbered({key: value for key, value in result.items() if key not in left_out}) for result in results]
    return expected, expected.loadRes(found)


def coco_metrics(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Compute COCO's twelve metrics for boxes or masks, or its ten for keypoints, in float64, by faster-coco-eval.

    The similarity of 17 keypoints has the widths of COCO's, that of other numbers 1 / K for each of K, as is usual.

    Args:
        ground_truth: COCO's annotations.
        results: COCO's results for its images.
        kind: bbox, segm or keypoints.

    Returns:
        `COCO_METRICS` or `KEYPOINT_METRICS` by name, as shares of 1, and for each category class, index and AP. A value is -1
        where there is no object to find: COCO's convention. The categories are in the order of the annotations' list.
    """
    names = KEYPOINT_METRICS if kind == "keypoints" else COCO_METRICS
    number = len(ground_truth["categories"][0].get("keypoints", []))
    widths = None if number in (0, 17) else [1 / number] * number
    evaluation = COCOeval_faster(*_as_coco(ground_truth, results, kind), kind, kpt_oks_sigmas=widths, **QUIET)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = {name: float(value) for name, value in zip(names, evaluation.stats[: len(names)], strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, categories), all sizes, 100 objects
    per_class = []
    for index, category in enumerate(evaluation.params.catIds):
        present = precision[:, :, index][precision[:, :, index] > -1]
        per_class.append(
            {
                "class": evaluation.cocoGt.cats[category]["name"],
                "index": index,
                "AP": float(present.mean()) if present.size else -1.0,
            }
        )
    return metrics, per_class


@dataclass(frozen=True)
class Curves:
    """How right a detector is at an IoU of 0.50, by class (K) and over all, which is the last row.

    Attributes:
        thresholds: Least scores (T), from 0 to 1.
        f1: F1 of the objects of at least these scores (K + 1, T); NaN for a class without objects.
        recalls: From 0 to 1 (R).
        precision: At these recalls, over all scores (K + 1, R); the mean over the classes last, NaN as above.
    """

    thresholds: NDArray[np.float64]
    f1: NDArray[np.float64]
    recalls: NDArray[np.float64]
    precision: NDArray[np.float64]

    @property
    def best(self) -> float:
        """The least score at which F1 over all objects is best."""
        return float(self.thresholds[self.f1[-1].argmax()])


def _matched(
    ground_truth: Mapping[str, Any], results: Iterable[Mapping[str, Any]], kind: Kind, by_class: bool
) -> COCOeval_faster:
    """Match what was found with what is expected at an IoU of 0.50, the best score first, within classes or across them."""
    evaluation = COCOeval_faster(*_as_coco(ground_truth, results, kind), kind, extra_calc=True, **QUIET)
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.maxDets = [1000]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.useCats = int(by_class)
    evaluation.evaluate()
    evaluation.accumulate()  # which writes into the records of objects with which they were matched
    return evaluation


def _is_ignored(evaluation: COCOeval_faster, found: Mapping[str, Any]) -> bool:
    """Whether an object lies in a crowd, where it is neither right nor wrong."""
    match = found.get("gt_id")
    return match is not None and bool(evaluation.cocoGt.anns[match]["iscrowd"])


def detection_curves(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind) -> Curves:
    """Compute F1 over the least score, and precision over recall; the arguments are those of `coco_metrics`."""
    evaluation = _matched(ground_truth, results, kind, by_class=True)
    number = len(ground_truth["categories"])
    found = [record for record in evaluation.cocoDt.anns.values() if not _is_ignored(evaluation, record)]
    labels = np.array([record["category_id"] for record in found], dtype=int)
    scores = np.array([record["score"] for record in found])
    right = np.array(["gt_id" in record for record in found], dtype=bool)
    objects = np.bincount(
        [record["category_id"] for record in evaluation.cocoGt.anns.values() if not record["iscrowd"]], minlength=number + 1
    )
    thresholds = np.linspace(0, 1, 101)
    f1 = np.full((number + 1, len(thresholds)), np.nan)
    for label in range(1, number + 2):
        total, of_label = (objects[label], labels == label) if label <= number else (objects.sum(), labels > 0)
        if total:
            sure = of_label & (scores >= thresholds[:, None])  # (T, N)
            f1[label - 1] = 2 * (sure & right).sum(axis=1) / (sure.sum(axis=1) + total)
    precision = evaluation.eval["precision"][0, :, :, 0, 0].T  # (K, R)
    precision = np.where(precision < 0, np.nan, precision)
    with_objects = precision[~np.isnan(precision).any(axis=1)]
    return Curves(thresholds, f1, evaluation.params.recThrs, np.vstack([precision, with_objects.mean(axis=0)]))


def detection_confusion(
    ground_truth: Mapping[str, Any], results: Iterable[Mapping[str, Any]], kind: Kind, score: float
) -> NDArray[np.int64]:
    """Count objects by true class (rows) and found class (columns) (K + 1, K + 1); the last of both is the background.

    Objects of at least a score are matched at an IoU of 0.50, whatever their class. What matches nothing is found in the
    background, and what is not matched is taken for it.
    """
    evaluation = _matched(ground_truth, (r for r in results if r["score"] >= score), kind, by_class=False)
    background = len(ground_truth["categories"])
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for found in evaluation.cocoDt.anns.values():
        if not _is_ignored(evaluation, found):
            match = found.get("gt_id")
            row = background if match is None else evaluation.cocoGt.anns[match]["category_id"] - 1
            counts[row, found["category_id"] - 1] += 1
    for expected in evaluation.cocoGt.anns.values():
        if not expected["iscrowd"] and "dt_id" not in expected:
            counts[expected["category_id"] - 1, background] += 1
    return counts
