"""COCO's results and its twelve metrics of boxes and masks."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
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
            probabilities.
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
    return results


def restrict(ground_truth: Mapping[str, Any], ids: Container[Any]) -> dict[str, Any]:
    """Return COCO's annotations of some images: those that could be read."""
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in ids],
        "annotations": [annotation for annotation in ground_truth["annotations"] if annotation["image_id"] in ids],
    }


def coco_metrics(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Literal["bbox", "segm"]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Compute COCO's twelve metrics for boxes or masks, in float64, by faster-coco-eval.

    Args:
        ground_truth: COCO's annotations.
        results: COCO's results for its images.
        kind: bbox or segm.

    Returns:
        `COCO_METRICS` by name, as shares of 1, and for each category class, index and AP. A value is -1 where there is no
        object to find: COCO's convention. The categories are in the order of the annotations' list.
    """
    quiet = {"print_function": lambda *_: None}
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
        **quiet,
    )
    # Masks go without their boxes, or the areas of the boxes would be taken for theirs.
    left_out = "bbox" if kind == "segm" else "segmentation"
    found = [numbered({key: value for key, value in result.items() if key != left_out}) for result in results]
    evaluation = COCOeval_faster(expected, expected.loadRes(found), kind, **quiet)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = {name: float(value) for name, value in zip(COCO_METRICS, evaluation.stats[: len(COCO_METRICS)], strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, categories), all sizes, 100 objects
    per_class = []
    for index, category in enumerate(evaluation.params.catIds):
        present = precision[:, :, index][precision[:, :, index] > -1]
        per_class.append(
            {"class": expected.cats[category]["name"], "index": index, "AP": float(present.mean()) if present.size else -1.0}
        )
    return metrics, per_class
