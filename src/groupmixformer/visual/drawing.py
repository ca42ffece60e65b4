"""Boxes, masks, keypoints and segments drawn on a copy of the image."""

import colorsys
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_keypoints, draw_segmentation_masks

from ..data.channels import stretched
from ..files import short

SIDE = 480  # smaller images are enlarged to this shorter side, so that names can be read
# Okabe and Ito's palette without black, which colour-blind people can tell apart.
SAFE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")


def palette(number: int) -> list[list[int]]:
    """Return colours (red, green, blue) for so many classes.

    Colour-blind people can tell the first seven apart. No palette is safe for more: the others are hues a golden section apart,
    in four degrees of brightness.
    """
    golden = (5**0.5 - 1) / 2
    more = (colorsys.hsv_to_rgb(i * golden % 1, 0.75, (1, 0.6, 0.8, 0.4)[i % 4]) for i in range(number))
    safe = (ImageColor.getrgb(color)[:3] for color in SAFE)
    return [list(color) for color in (*safe, *([round(255 * part) for part in color] for color in more))][:number]


def ink_on(color: Sequence[int]) -> str:
    """Return black or white, whichever is easier to read on a colour (red, green, blue), by WCAG's relative luminance."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[int, int] | None]:
    """Find places for the labels of boxes in an image, so that none covers another.

    Args:
        boxes: Left, top, right, bottom of each; the first ones choose first.
        sizes: Width and height of each label.
        canvas: Width and height of the image.

    Returns:
        Left and top of each label: above its box, below or inside, as near as there is place; none where there is none.
    """
    taken: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int] | None] = []
    for (left, top, right, bottom), (width, height) in zip(boxes, sizes, strict=True):
        rows = (top - height, bottom, top, bottom - height, top - 2 * height, bottom + height, top + height)
        columns = (left, right - width, (left + right - width) / 2)
        found = None
        for y, x in itertools.product(map(round, rows), columns):
            x = round(min(max(x, 0), max(0, canvas[0] - width)))
            inside = 0 <= y <= canvas[1] - height
            if inside and all(x >= r or x + width <= l or y >= b or y + height <= t for l, t, r, b in taken):  # noqa: E741
                found = (x, y)
                taken.append((x, y, x + width, y + height))
                break
        places.append(found)
    return places


def _write(texts: Sequence[str]) -> tuple[str, list[str]]:
    """Return the file of the font that has most characters of some lines, and the lines as it can draw them."""
    from .fonts import best_font, drawable  # which bring matplotlib, and are imported only where something is drawn

    font = best_font(texts)
    return font, [drawable(text, [font]) for text in texts]


def _canvas(image: Image.Image) -> tuple[Tensor, float]:
    """Return the image (3, H, W), uint8, enlarged if it is small, and the factor."""
    factor = max(1.0, SIDE / min(image.size))
    size = [round(side * factor) for side in (image.height, image.width)]
    return F.pil_to_tensor(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)), factor


def to_image(pixels: Tensor, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)) -> Image.Image:
    """Return what a network takes (C, H, W) as an image: with the mean and standard deviation that it was normalised by."""
    if len(pixels) != 3:
        return Image.fromarray(stretched(pixels.permute(1, 2, 0).numpy()))
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return F.to_pil_image((pixels * scale + shift).clamp(0, 1))


def draw_objects(
    image: Image.Image, objects: Mapping[str, Tensor], names: Sequence[str], skeleton: Sequence[Sequence[int]] = ()
) -> Image.Image:
    """Draw boxes, masks and keypoints with names and scores.

    Args:
        image: RGB.
        objects: Boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N) from 1 on; maybe scores (N), masks (N, H, W) of booleans,
            and keypoints (N, K, 3) as x, y and 0 for those that are not there.
        names: Of the classes.
        skeleton: Pairs of keypoints, by number, between which a line is drawn.

    Returns:
        A copy, enlarged if the image is small. No label covers another: among many boxes, some have none.
    """
    canvas, factor = _canvas(image)
    labels = objects["labels"].tolist()
    if not labels:
        return F.to_pil_image(canvas)
    # One colour for each class, or for each object where there is only one class.
    chosen = palette(max(len(names), len(labels)))
    colors: Any = [tuple(chosen[i if len(names) == 1 else label - 1]) for i, label in enumerate(labels)]
    if "masks" in objects:
        masks = F.resize(objects["masks"].to(torch.uint8), list(canvas.shape[-2:]), F.InterpolationMode.NEAREST).bool()
        masks &= masks.cumsum(dim=0) == 1  # torchvision paints overlaps black: the first mask, with the best score, wins
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.4, colors=colors)
    width = max(2, round(min(canvas.shape[-2:]) / 240))
    if "keypoints" in objects:
        for places, color in zip(objects["keypoints"].flip(0), colors[::-1], strict=True):  # the best are drawn over the others
            lines: Any = [tuple(pair) for pair in skeleton] or None
            seen, points = places[None, :, 2] > 0, places[None, :, :2] * factor
            canvas = draw_keypoints(canvas, points, lines, color, 2 * width, width, seen)
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
    file, texts = _write(
        [
            short(names[label - 1]) + ("" if score is None else f" {score:.0%}")
            for label, score in zip(labels, scores, strict=True)
        ]
    )
    page = F.to_pil_image(canvas)
    pen, side = ImageDraw.Draw(page), min(page.size)
    size = max(12, round(side / 36))
    font = ImageFont.truetype(file, size)
    padding, height = size // 4, round(1.4 * size)
    boxes = (objects["boxes"] * factor).tolist()
    for box, color in reversed(list(zip(boxes, colors, strict=True))):  # the best are drawn over the others
        pen.rectangle(box, outline=color, width=width)
    sizes = [(round(font.getlength(text)) + 2 * padding, height) for text in texts]
    for place, (wide, _), text, color in zip(place_labels(boxes, sizes, page.size), sizes, texts, colors, strict=True):
        if place:
            x, y = place
            pen.rectangle((x, y, x + wide - 1, y + height - 1), fill=color)
            pen.text((x + padding, y + height / 2), text, fill=ink_on(color), font=font, anchor="lm")
    return page


def draw_segments(image: Image.Image, labels: Tensor, names: Sequence[str], colors: Sequence[Sequence[int]]) -> Image.Image:
    """Overlay the colours of the classes on an image, with a legend beside it.

    Args:
        image: RGB.
        labels: Class of each pixel (H, W); pixels of other values are left unchanged.
        names: Of the classes.
        colors: Of the classes: red, green, blue.

    Returns:
        A copy, enlarged if the image is small, with a legend of its classes, the largest first.
    """
    canvas, _ = _canvas(image)
    labels = F.resize(labels[None].to(torch.uint8), list(canvas.shape[-2:]), F.InterpolationMode.NEAREST)[0]
    counts = labels.flatten().bincount(minlength=256)[: len(names)]
    present = [index for index in counts.argsort(descending=True).tolist() if counts[index]]
    if present:
        masks = torch.stack([labels == index for index in present])
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.6, colors=[tuple(colors[index]) for index in present])
    size = max(12, canvas.shape[1] // 32)
    file, lines = _write([f"{short(names[index])}  {int(counts[index]) / labels.numel():.1%}" for index in present])
    font = ImageFont.truetype(file, size)
    # As wide for every image of a data set, so that images beside each other have the same size.
    widest = max((font.getlength(f"{short(name)}  100.0%") for name in names), default=0)
    wide = round(max(widest, *map(font.getlength, lines), 0)) + 3 * size if lines else 3 * size
    page = Image.new("RGB", (canvas.shape[2] + wide, max(canvas.shape[1], 2 * size * len(lines))), "white")
    page.paste(F.to_pil_image(canvas), (0, 0))
    pen = ImageDraw.Draw(page)
    for row, (index, line) in enumerate(zip(present, lines, strict=True)):
        left, top = canvas.shape[2] + size // 2, round(1.6 * size * row) + size // 2
        pen.rectangle((left, top, left + size, top + size), fill=tuple(colors[index]), outline="black")
        pen.text((left + 1.6 * size, top), line, fill="black", font=font)
    return page
