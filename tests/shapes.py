"""Images of squares and discs on noise, with COCO's annotations: a data set that a small detector learns in a minute."""

import json

import numpy as np
from PIL import Image

KEYPOINTS = {"keypoints": ["centre", "left", "right"], "skeleton": [[1, 2], [1, 3]]}  # left as it is seen
# With gaps and in no order: label 1 is square, 2 is disc.
CATEGORIES = [{"id": 7, "name": "disc", **KEYPOINTS}, {"id": 3, "name": "square", **KEYPOINTS}]
COLORS = {3: (250, 60, 40), 7: (40, 120, 250)}
SIZES = [(64, 64), (80, 72), (67, 83), (72, 64)]  # (width, height)


def runs(mask):
    """COCO's uncompressed run-length encoding of a mask (H, W): down the columns, zeros first."""
    pixels = mask.T.reshape(-1).astype(bool)
    changes = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *changes, pixels.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def write_coco(root, split, images, objects, categories=CATEGORIES):
    """Write annotations/instances_SPLIT.json and return its path."""
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": objects, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def write_split(root, split, number, seed=0, categories=CATEGORIES, sizes=SIZES):
    """Write images with one to three objects in their quarters, and none in every fifth; masks are polygons or runs."""
    rng = np.random.default_rng([seed, *split.encode()])
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for i in range(number):
        width, height = sizes[i % len(sizes)]
        pixels = rng.integers(60, 140, (height, width, 3), dtype=np.uint8)
        images.append({"id": 1000 + 7 * i, "file_name": f"{split}-{i}.png", "width": width, "height": height})
        quarters = rng.permutation(4)[: rng.integers(1, 4) if i % 5 != 4 else 0].tolist()
        for quarter in quarters:
            side = int(rng.integers(16, 28))
            left = int(rng.integers(0, width // 2 - side + 1)) + quarter % 2 * (width // 2)
            top = int(rng.integers(0, height // 2 - side + 1)) + quarter // 2 * (height // 2)
            category = int(rng.choice([3, 7]))
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[top : top + side, left : left + side] = 1
            if category == 7:
                rows, columns = np.ogrid[:height, :width]
                centre = (top + (side - 1) / 2, left + (side - 1) / 2)
                mask &= (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= (side / 2) ** 2
            pixels[mask > 0] = COLORS[category]
            middle = top + side // 2
            keypoints = [left + side // 2, middle, 2, left, middle, 1, left + side - 1, middle, 2]
            objects.append(
                {
                    "id": len(objects),  # from 0, which pycocotools takes for none
                    "image_id": images[-1]["id"],
                    "category_id": category,
                    "bbox": [left, top, side, side],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": polygon(left, top, side, side) if category == 3 else runs(mask),
                    "keypoints": keypoints,
                    "num_keypoints": 3,
                }
            )
        Image.fromarray(pixels).save(root / "images" / images[-1]["file_name"])
    crowd = np.zeros((images[0]["height"], images[0]["width"]), dtype=np.uint8)
    crowd[:, -8:] = 1
    box = [images[0]["width"] - 8, 0, 8, images[0]["height"]]
    objects.append(
        {
            "id": len(objects),
            "image_id": images[0]["id"],
            "category_id": 3,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 1,
            "segmentation": runs(crowd),
        }
    )
    return write_coco(root, split, images, objects, categories)


def write_shapes(root, train=8, val=5, **options):
    write_split(root, "train", train, **options)
    write_split(root, "val", val, **options)
    return root
