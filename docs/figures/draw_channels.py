"""Draw what a segmenter of four channels finds as channels.webp, next to this file: ``python docs/figures/draw_channels.py``.

Discs are in the fourth channel alone, over crops of a photograph that ships with scikit-learn, so that red, green and blue tell
nothing of them. It trains for two minutes on 2 CPU cores, with the extra `segmentation`.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from groupmixformer.cli.main import main
from groupmixformer.data.channels import ChannelImage, in_colour
from groupmixformer.run import Run

SIDE, SHOWN = 96, 2


def write_data() -> None:
    """Write images/ of arrays, masks/ and classes.json into the current folder."""
    rng, photograph = np.random.default_rng(0), load_sample_image("china.jpg")
    for part, number in (("train", 32), ("val", 8)):
        for kind in ("images", "masks"):
            Path("discs", kind, part).mkdir(parents=True)
        for i in range(number):
            top, left = (int(rng.integers(side // 2 - SIDE // 2, side - SIDE)) for side in photograph.shape[:2])
            (y, x), radius = rng.integers(20, SIDE - 20, 2).tolist(), int(rng.integers(10, 20))
            disc = np.hypot(*(np.mgrid[:SIDE, :SIDE] - np.array([y, x])[:, None, None])) < radius
            depth = rng.normal(120 + 40 * disc, 12).clip(0, 255).astype(np.uint8)
            np.save(f"discs/images/{part}/{i}.npy", np.dstack([photograph[top : top + SIDE, left : left + SIDE], depth]))
            Image.fromarray(disc.astype(np.uint8)).save(f"discs/masks/{part}/{i}.png")
    classes = [{"id": 0, "name": "ground", "color": [60, 60, 60]}, {"id": 1, "name": "disc", "color": [230, 159, 0]}]
    Path("discs", "classes.json").write_text(json.dumps({"classes": classes}))


def train() -> None:
    """Train on them, by the statistics that `gmf data discs --statistics` prints."""
    from groupmixformer.tasks.survey import channel_statistics

    found, _ = channel_statistics("discs")
    options = ["--in-chans", "4", "--mean", str(found["mean"]), "--std", str(found["std"]), "--image-size", str(SIDE)]
    options += ["--segmenter.decoder", "fpn", "--segmenter.channels", "64", "--segmenter.scale", "[0.9, 1.1]", "--workers", "0"]
    options += ["--epochs", "12", "--batch-size", "8", "--optimizer.lr", "1e-3", "--optimizer.lr-batch", "null"]
    assert main(["train", "camvid", "--data", "discs", "--checkpoint", "null", "--out", "run", *options]) == 0


def draw(path: Path) -> None:
    """Draw held-out images: their colours, their fourth channel, what is annotated, what is found."""
    run = Run.open("run")
    titles = ("channels 0, 1, 2", "channel 3", "annotated", "found")
    figure = Figure(figsize=(8, 2.05 * SHOWN + 0.3), layout="constrained")
    for row, axes in enumerate(figure.subplots(SHOWN, len(titles))):
        pixels = np.load(f"discs/images/val/{row}.npy")
        found = run.predict(pixels, device="cpu").files["-mask.png"]
        Path("found.png").write_bytes(found)
        masks = [np.asarray(Image.open(name)) for name in (f"discs/masks/val/{row}.png", "found.png")]
        pictures = [in_colour(ChannelImage(pixels, display)) for display in ((0, 1, 2), (3,))]
        for axis, shown, title in zip(axes, [*pictures, *masks], titles, strict=True):
            axis.imshow(shown, cmap="cividis", vmin=0, vmax=1 if np.ndim(shown) == 2 else None)
            axis.set_axis_off()
            if not row:
                axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    target = Path(__file__).with_name("channels.webp").resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_data()
        train()
        draw(target)
        os.chdir("/")
