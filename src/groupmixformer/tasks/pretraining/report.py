"""The report of pre-training: losses, what is filled in or found alike, and nearest neighbours where folders name classes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Subset

from ...data.channels import AnyImage
from ...files import short
from ...models.checkpoint import load_model
from ...run_folder import RECIPE, RunFolder, read_metrics
from ...training.recipe import read_recipe
from ...visual.drawing import to_image
from ...visual.page import Block, Gallery, Shown
from ...weights import read_tensors
from ..predictor import EvalResult, Predicted, Predictor, Progress, Stopwatch, percent
from ..report import finish, run_charts
from .data import UnlabelledImages, collate_unlabelled, find_images
from .model import MaskedImageModel
from .training import HEAD

MOST = {"train": 2000, "held out": 500}  # images whose features are compared
NEIGHBOURS = 20  # of which the most frequent folder is taken, as the paper of DINO does
COLLAPSED = 0.1  # nats that the output tells of an image


class PretrainingReporter(Predictor):
    """Measures a pre-trained backbone: its features of training and held-out images, and what it fills in."""

    def load(self, run: RunFolder, image_size: int | None) -> tuple[Any, dict[str, Any]]:
        """Return the backbone."""
        self.recipe, self.folder, self.class_names = read_recipe(str(run.path / RECIPE)), run.path, []
        return load_model(run), run.config

    def predict(self, image: AnyImage, name: str = "") -> Predicted:
        """Raise ValueError: a backbone without classes has nothing to predict, as `PretrainingTask.predictor` says."""
        raise ValueError(f"{self.folder}: holds a pre-trained backbone, which has no classes to predict")

    def open_data(self, data: str, splitter: Any = None) -> UnlabelledImages:
        """Open the held-out images of the run's own data, and the training images."""
        train, held_out, _ = find_images(self.recipe, splitter)
        config = {name: self.model.pretrained_cfg[name] for name in ("mean", "std", "interpolation")}
        self.train = UnlabelledImages(train, self.recipe, config)
        return UnlabelledImages(held_out, self.recipe, config)

    def _features(
        self, images: UnlabelledImages, most: int, workers: int, progress: Progress, watch: Stopwatch
    ) -> tuple[NDArray[Any], list[int], list[str]]:
        """Return the features of some images (N, D), their numbers, and a line for each that cannot be read."""
        chosen = sorted(np.random.default_rng(0).permutation(len(images))[:most].tolist())
        features, counted, skipped = [], [], []
        loader = DataLoader(Subset(images, chosen), 64, num_workers=workers, collate_fn=collate_unlabelled)
        for batch, _, counts, problems in progress(loader, "features"):
            with torch.inference_mode(), watch:
                features.append(self.model(batch.to(self.device)).float().cpu()[counts])
            counted.append(counts)
            skipped += problems
        kept = [index for index, counts in zip(chosen, torch.cat(counted).tolist(), strict=True) if counts]
        return torch.cat(features).numpy(), kept, skipped

    def evaluate(self, images: Any, workers: int = 0, progress: Progress = lambda items, _: items) -> EvalResult:
        """Compare the features of held-out images with those of training images."""
        from sklearn.neighbors import KNeighborsClassifier

        watch = Stopwatch()
        known, train, more = self._features(self.train, MOST["train"], workers, progress, watch)
        features, held_out, skipped = self._features(images, MOST["held out"], workers, progress, watch)
        centre = known.mean(axis=0)  # what all images have in common would make all of them alike
        known, features = known - centre, features - centre
        names, wanted = (
            [data.paths[index].parent.name for index in indices] for data, indices in ((self.train, train), (images, held_out))
        )
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(known)), metric="cosine").fit(known, names)
        few = np.random.default_rng(0).permutation(len(features))[:6]
        _, found = neighbours.kneighbors(features[few], min(5, len(known)))
        self.alike = [(held_out[one], [train[i] for i in row]) for one, row in zip(few, found, strict=True)]
        row = read_metrics(self.folder)[-1]
        known_as = {"loss": "L1 of held-out masked pixels", "information": "nats an output tells of an image"}
        told = {name: what for name, what in known_as.items() if f"val_{name}" in row}
        result: dict[str, Any] = {"images": len(features), **{name: row[f"val_{name}"] for name in told}}
        lines = [f"{what} {result[name]:.4f}" for name, what in told.items()]
        if len(set(names)) > 1 and set(wanted) <= set(names):
            result["knn_top1"] = float(neighbours.score(features, wanted))
            lines.append(f"folder by the {neighbours.n_neighbors} nearest images right {percent(result['knn_top1'])}")
        collapsed = result.get("information", 1) < COLLAPSED
        remarks = ["the teacher says nearly the same of all images: nothing is learnt yet, or no more"] * collapsed
        return EvalResult(
            result | watch.rates(len(known) + len(features)), "  ".join(lines), "", [*more, *skipped], remarks=remarks
        )

    def _strip(self, images: list[Image.Image]) -> Image.Image:
        side = max(160, self.recipe.image_size)
        strip = Image.new("RGB", (len(images) * (side + 8) - 8, side), "white")
        for place, image in enumerate(images):
            strip.paste(image.resize((side, side), Image.Resampling.BICUBIC), (place * (side + 8), 0))
        return strip

    def _filled(self, images: UnlabelledImages) -> list[Shown]:
        """Show images, what of them the network saw, and what it filled in."""
        settings, size = self.recipe.pretrain, self.recipe.image_size
        network = MaskedImageModel(self.model.cpu(), size, settings.mask_patch, self.recipe.in_chans)
        network.load_state_dict(read_tensors(self.folder / HEAD), strict=False)
        network.eval()
        shown = []
        for index, _ in self.alike:
            image, mask, *_ = images[index]
            with torch.inference_mode():
                predicted = network(image[None], mask[None])[0]
                hidden = network.of_pixels(mask[None])[0]
                seen = network.hide(image[None], mask[None])[0]
            parts = [image, seen, torch.where(hidden, predicted, image)]
            cfg = self.model.pretrained_cfg
            drawn = [to_image(part, cfg["mean"], cfg["std"]) for part in parts]
            shown.append(Shown(self._strip(drawn), f"{short(images.paths[index].name)}: whole, masked, filled in"))
        return shown

    def _neighbours(self, images: UnlabelledImages) -> list[Shown]:
        """Show held-out images and the training images whose features are most like theirs."""
        cfg, shown = self.model.pretrained_cfg, []
        for index, nearest in self.alike:
            parts = [images[index][0], *(self.train[i][0] for i in nearest)]
            drawn = [to_image(part, cfg["mean"], cfg["std"]) for part in parts]
            folders = ", ".join(short(self.train.paths[i].parent.name) for i in nearest)
            shown.append(Shown(self._strip(drawn), f"{short(images.paths[index].name)}, then the nearest, of {folders}"))
        return shown

    def report(self, folder: Path, images: Any, measured: EvalResult) -> Path:
        """Write the report; takes and returns what `Predictor.report` does."""
        filled: list[Block] = [Gallery("filled", lambda: self._filled(images), large=True)]
        alike: list[Block] = [Gallery("neighbours", lambda: self._neighbours(images), large=True)]
        masked = self.recipe.pretrain.method == "simmim"
        sections: dict[str, list[Block]] = {
            "": filled if masked else alike,
            "How the training went": run_charts(folder),
            **({"Held-out images and the most alike of the training images": alike} if masked else {}),
        }
        result = measured.result
        tiles: dict[str, str] = {name: f"{result[name]:.4f}" for name in ("loss", "information") if name in result}
        if "knn_top1" in result:
            tiles["folder by the nearest images"] = percent(result["knn_top1"])
        heading = f"Pre-trained by {self.recipe.pretrain.method} on {len(self.train):,} images without labels"
        return finish(folder, heading, tiles, sections, measured)
