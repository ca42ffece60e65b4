"""Boxes, masks and segments drawn on a copy of the image."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..files import short

SIDE = 480  # smaller images are enlarged to this shorter side, so that names can be read


def palette(number: int) -> list[list[int]]:
    """Return bright colours (red, green, blue) for so many classes: hues a golden section apart, so that neighbours differ."""
    golden = (5**0.5 - 1) / 2
    return [[round(255 * part) for part in colorsys.hsv_to_rgb(i * golden % 1, 0.75, 1.0)] for i in range(number)]


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
    """Return what a network takes (3, H, W) as an image: with the mean and standard deviation that it was normalised by."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return F.to_pil_image((pixels * scale + shift).clamp(0, 1))


def draw_objects(image: Image.Image, objects: Mapping[str, Tensor], names: Sequence[str]) -> Image.Image:
    """Draw boxes and masks with names and scores.

    Args:
        image: RGB.
        objects: Boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N) from 1 on; maybe scores (N), and masks (N, H, W) of
            booleans.
        names: Of the classes.

    Returns:
        A copy, enlarged if the image is small.
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
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
    font, texts = _write(
        [
            short(names[label - 1]) + ("" if score is None else f" {score:.0%}")
            for label, score in zip(labels, scores, strict=True)
        ]
    )
    side = min(canvas.shape[-2:])
    style: Any = {"width": max(1, side // 300), "font": font, "font_size": max(9, side // 45)}
    drawn = draw_bounding_boxes(canvas, objects["boxes"] * factor, texts, colors, **style)
    return F.to_pil_image(drawn)


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
    wide = max((round(font.getlength(line)) for line in lines), default=0) + 3 * size
    page = Image.new("RGB", (canvas.shape[2] + wide, max(canvas.shape[1], 2 * size * len(lines))), "white")
    page.paste(F.to_pil_image(canvas), (0, 0))
    pen = ImageDraw.Draw(page)
    for row, (index, line) in enumerate(zip(present, lines, strict=True)):
        left, top = canvas.shape[2] + size // 2, round(1.6 * size * row) + size // 2
        pen.rectangle((left, top, left + size, top + size), fill=tuple(colors[index]), outline="black")
        pen.text((left + 1.6 * size, top), line, fill="black", font=font)
    return page
