"""Published accuracies of models, drawn against the speeds that a benchmark measured."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..released import VARIANTS
from ..tasks.registry import find_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED_TOP1 = {f"groupmixformer_{name}": variant.top1 for name, variant in VARIANTS.items()}

# Top-1 accuracy in % on ImageNet's validation set at 224, trained on ImageNet-1K alone, and the paper on arXiv that has it.
# Weights that timm offers under these names can differ: they may be of another training, such as convnext_tiny's, or of
# another date: its swin_tiny measures 81.4, the paper has 81.3 and the authors' repository 81.2.
PEERS_TOP1 = {
    "coat_lite_tiny": (77.5, "2104.06399"),
    "coat_lite_mini": (79.1, "2104.06399"),
    "coat_lite_small": (81.9, "2104.06399"),
    "convnext_tiny": (82.1, "2201.03545"),
    "convnext_small": (83.1, "2201.03545"),
    "convnext_base": (83.8, "2201.03545"),
    "davit_tiny": (82.8, "2204.03645"),
    "davit_small": (84.2, "2204.03645"),
    "davit_base": (84.6, "2204.03645"),
    # As in the version of ICML 2023; earlier ones have 83.2 and 83.4 for tiny.
    "gcvit_xxtiny": (79.9, "2206.09959"),
    "gcvit_xtiny": (82.0, "2206.09959"),
    "gcvit_tiny": (83.5, "2206.09959"),
    "gcvit_small": (84.3, "2206.09959"),
    "gcvit_base": (85.0, "2206.09959"),
    "pvt_v2_b0": (70.5, "2106.13797"),
    "pvt_v2_b1": (78.7, "2106.13797"),
    "pvt_v2_b2": (82.0, "2106.13797"),
    "pvt_v2_b3": (83.1, "2106.13797"),
    "pvt_v2_b4": (83.6, "2106.13797"),
    "pvt_v2_b5": (83.8, "2106.13797"),
    "resnet50": (80.4, "2110.00476"),  # "ResNet strikes back", procedure A1
    "swin_tiny_patch4_window7_224": (81.3, "2103.14030"),
    "swin_small_patch4_window7_224": (83.0, "2103.14030"),
    "swin_base_patch4_window7_224": (83.5, "2103.14030"),
}


def published_top1(name: str) -> float | None:
    """Return the accuracy in % in a model's paper; none where it is not listed here."""
    return PEERS_TOP1[name][0] if name in PEERS_TOP1 else PUBLISHED_TOP1.get(name)


def at_published_size(names: Sequence[str], task: str, size: tuple[int, int]) -> list[str]:
    """Return those of the models whose accuracy is published for this task and size.

    Raises:
        ValueError: If there is none.
    """
    chosen = [name for name in names if published_top1(name) and size == ((384, 384) if name.endswith("_384") else (224, 224))]
    if not find_task(task).published or not chosen:
        raise ValueError(
            f"no accuracy of {', '.join(names)} for {task} at {size[0]} x {size[1]} is known to plot, expected classification "
            "at 224 (384 for a model of that name) of GroupMixFormer, CoaT-Lite, ConvNeXt, DaViT, GC ViT, PVT v2, ResNet, Swin"
        )
    return chosen


def accuracy_against_speed(rows: Sequence[dict[str, Any]], title: str) -> "Figure":
    """Draw published top-1 against measured images/s, a labelled point for each row of a benchmark."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    from matplotlib.transforms import Bbox

    from ..visual.figures import BLUE, ORANGE

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    groups = {"GroupMixFormer": (BLUE, "o"), "other models": (ORANGE, "s")}
    for group, (color, marker) in groups.items():
        chosen = [row for row in rows if row["model"].startswith("groupmixformer_") == (group == "GroupMixFormer")]
        if chosen:
            speeds, accuracies = [row["images_per_second"] for row in chosen], [row["published_top1"] for row in chosen]
            axes.plot(speeds, accuracies, marker, color=color, markersize=8, label=group)
    axes.set(xscale="log", xlabel="images/s, measured", ylabel="top-1 on ImageNet, published (%)")
    axes.set_title("\n".join(textwrap.wrap(title, 110)), fontsize=9)
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.margins(0.15)
    axes.grid(alpha=0.3, which="both")
    legend = axes.legend()
    figure.draw_without_rendering()  # fixes the positions of the points, so that labels can avoid them
    points = axes.transData.transform([(row["images_per_second"], row["published_top1"]) for row in rows])
    taken = [legend.get_window_extent(), *(Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points)]
    places = [(8, 0), (-8, 0), (0, 12), (0, -12), *((x, y) for y in (24, -24, 36, -36) for x in (8, -8))]
    for row in sorted(rows, key=lambda row: row["images_per_second"]):
        for x, y in places:
            label = axes.annotate(
                row["model"],
                (row["images_per_second"], row["published_top1"]),
                (x, y),
                textcoords="offset points",
                fontsize=8,
                ha={-1: "right", 0: "center", 1: "left"}[(x > 0) - (x < 0)],
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if abs(y) > 12 else None,
            )
            box = label.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (x, y) != places[-1]:
                label.remove()
        taken.append(box)
    return figure
