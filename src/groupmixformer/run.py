"""A run, as users and commands hold it: opened once, then used to predict, evaluate, explain and export."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .data.channels import AnyImage, Channels
from .data.images import to_rgb
from .data.split import Splitter
from .models.fuse import fuse as inference_form
from .models.groupmixformer import GroupMixFormer
from .run_folder import CONFIG, SPLIT, RunFolder, one_line
from .tasks.graphs import replay_repeated
from .tasks.predictor import EvalResult, Point, Predicted, Predictor, Progress
from .tasks.registry import PRECISIONS, TaskSpec, check_options, find_task, resolve_device
from .threads import ThreadChoice

if TYPE_CHECKING:  # which bring jsonargparse and matplotlib
    from .tasks.explainer import Explainer
    from .training.recipe import Recipe

ImageLike = str | Path | Image.Image | NDArray[Any]
Made = TypeVar("Made")


def _quiet(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    return items


def open_image(image: ImageLike, channels: Channels | None = None) -> tuple[AnyImage, str]:
    """Return an image, with its name.

    Args:
        image: A path, a PIL image, or an array: of colours (H, W) or (H, W, C) of 8 bits, of other channels as in files.
        channels: That it is read with; RGB by default.

    Raises:
        ValueError: If it cannot be read.
    """
    channels = channels or Channels()
    if isinstance(image, str | Path):
        return channels.read(Path(image).expanduser()), str(image)
    if isinstance(image, np.ndarray) and channels.count != 3:
        return channels.of_array(image), ""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            shape = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"got an array of {shape}, expected uint8 of shape (height, width) or (height, width, channels)")
        return to_rgb(Image.fromarray(image)), ""
    return channels.convert(image), str(getattr(image, "filename", ""))


class Run:
    """A trained model with all that is stored beside it.

    Its files are read once, when they are first asked for, and the network is loaded once for each way to use it.

    Attributes:
        folder: What the run holds.
        definition: Its task, as the registry has it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._open: dict[str, tuple[str, Any]] = {}  # the last predictor and explainer, with how they were opened

    @classmethod
    def open(cls, path: str | Path, allow_nonfinite: bool = False) -> "Run":
        """Open a run.

        Args:
            path: Folder of a run or of `gmf convert`, a checkpoint file, or ``hf-hub:user/name`` with or without ``@revision``.
                A file in the folder of a run, such as ``checkpoints/last.ckpt``, is that run with these weights.
            allow_nonfinite: Load weights that hold NaN or infinite values, to study them.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            OSError: If it cannot be fetched from a hub.
            ValueError: If its config.json is not a model configuration, or names a task that is not installed.
        """
        folder = RunFolder(path, allow_nonfinite)
        if not folder.path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
        run, task = cls(folder), folder.task
        try:
            find_task(task)
        except ValueError as error:
            raise ValueError(f"{folder.path / CONFIG}: {error}") from error
        return run

    def __repr__(self) -> str:
        return f"Run({self.folder.source!r}, {self.task})"

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return self.folder.path

    @property
    def task(self) -> str:
        """What the model was trained for, such as detection."""
        return self.folder.task

    @property
    def definition(self) -> TaskSpec:
        """The task, with what is particular to it."""
        return find_task(self.task)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds; nothing for a checkpoint file."""
        return self.folder.config

    @cached_property
    def recipe(self) -> "Recipe | None":
        """The recipe that it was trained by; none where that is not known.

        Raises:
            ValueError: If there is one that cannot be read.
        """
        if self.folder.recipe_path is None:
            return None
        from .training.recipe import RecipeError, read_recipe

        try:
            return read_recipe(str(self.folder.recipe_path))
        except RecipeError as error:
            raise ValueError(str(error)) from error

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.csv, one for each epoch."""
        return self.folder.metrics

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that trained it, and the machine."""
        return self.folder.versions

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.definition.class_names(self.folder)

    def load(self, device: str | torch.device = "cpu") -> Any:
        """Return a network of its own, in eval mode in float32.

        Args:
            device: To put it on; ``auto`` is CUDA where there is one.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If it cannot be read.
        """
        return self.definition.load(self.folder).to(resolve_device(device))

    def _check(self, options: Iterable[str], known: Sequence[str], method: str) -> None:
        check_options(self.folder, options)
        if others := sorted(set(options) - set(known)):
            raise ValueError(f"{others[0]} is no option of {method}, expected some of {', '.join(known) or 'none'}")

    def _once(self, kind: str, how: str, make: Callable[[], Made]) -> Made:
        if self._open.get(kind, ("", None))[0] != how:
            self._open[kind] = (how, make())
        made: Made = self._open[kind][1]
        return made

    def predictor(
        self,
        device: str | torch.device = "auto",
        image_size: int | None = None,
        precision: str = "fp32",
        fuse: bool = True,
        threads: int | Literal["auto"] | None = None,
        **options: Any,
    ) -> Predictor:
        """Return the model ready to look at images; the same one if it is asked for in the same way again.

        Args:
            device: To run on; ``auto`` is CUDA where there is one.
            image_size: Side of the images, or the shorter side; the model's own by default.
            precision: fp32, or bf16 or fp16 for autocast.
            fuse: Take the inference form of a GroupMixFormer, and on CUDA, CUDA graphs for sizes that come again.
            threads: CPU threads of PyTorch from then on; ``auto`` chooses by the first images; none leaves them alone.
            options: Of the task: ``top`` classes to name; ``score_threshold`` of objects and of several labels;
                ``sliding_window``, ``scales`` and ``flip`` for segments.

        Raises:
            ValueError: If an option is for another task, or the run cannot be read.
        """
        self._check(options, self.definition.predictor_options, "predict")
        task, where, dtype = self.definition, resolve_device(device), PRECISIONS[precision]

        def make() -> Predictor:
            made = task.predictor(self.folder, where, image_size, dtype, **options)
            if fuse and any(isinstance(module, GroupMixFormer) for module in made.model.modules()):
                made.model, made.fused = inference_form(made.model), True
            if fuse and where.type == "cuda":
                replay_repeated(task.compiled_part(made.model))
            if threads and where.type == "cpu":
                ThreadChoice(None if threads == "auto" else threads).watch(made.model)
            return made

        return self._once("predictor", f"{where} {image_size} {precision} {fuse} {threads} {sorted(options.items())}", make)

    def explainer(self, device: str | torch.device = "auto", image_size: int | None = None, **options: Any) -> "Explainer":
        """Return the model ready to explain images; the same one if it is asked for in the same way again.

        Args:
            device: To run on; ``auto`` is CUDA where there is one.
            image_size: Side of the images, or the shorter side; the model's own by default.
            options: Of the task: ``wanted_class``, name or number of the class to explain; ``wanted_object``, its number.

        Raises:
            ValueError: If an option is for another task, the class does not exist, or the run cannot be read.
        """
        self._check(options, self.definition.explainer_options, "explain")
        task, where = self.definition, resolve_device(device)
        return self._once(
            "explainer",
            f"{where} {image_size} {sorted(options.items())}",
            lambda: task.explainer(self.folder, where, image_size, **options),
        )

    @overload
    def predict(self, images: ImageLike, **options: Any) -> Predicted: ...

    @overload
    def predict(self, images: Sequence[ImageLike], **options: Any) -> list[Predicted]: ...

    def predict(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> Predicted | list[Predicted]:
        """Look at images.

        Args:
            images: One, or a list: paths, PIL images, or arrays (H, W) or (H, W, C) of 8 bits; of other channels than colours,
                as files hold them.
            options: As `predictor` takes them: device, image_size, precision, fuse, threads and those of the task.

        Returns:
            For each image what was found: ``result`` as a dictionary, ``text`` in a line, ``files`` with drawings and masks.

        Raises:
            ValueError: If an image or the run cannot be read, or an option is for another task.
        """
        predictor = self.predictor(**options)
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            return predictor.predict(*open_image(images, predictor.channels))
        return [predictor.predict(*open_image(image, predictor.channels)) for image in images]

    def detections(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> Any:
        """Find objects, as supervision has them: for its annotators, trackers, zones and metrics.

        Args:
            images: As `predict` takes them.
            options: As `predict` takes them.

        Returns:
            supervision.Detections for each image.

        Raises:
            ValueError: As `predict` does, or if the run is no detector.
            ModuleNotFoundError: If supervision is missing.
        """
        predictor, found = self.predictor(**options), self.predict(images, **options)
        return [predictor.to_supervision(one) for one in found] if isinstance(found, list) else predictor.to_supervision(found)

    def explain(
        self,
        image: ImageLike,
        queries: Sequence[Point] = (),
        stages: Sequence[int] = (),
        format: str = "png",
        **options: Any,
    ) -> Predicted:
        """Show what positions of an image attend to, and what speaks for a class, an object or a segment.

        Args:
            image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8 bits.
            queries: Pixels (row, column) of the image; the most relevant one by default.
            stages: Of the attention, 0 to 3, the last also of the relevance; the deepest that suit the size by default.
            format: Of the figure: png, svg or pdf.
            options: As `explainer` takes them: device, image_size and those of the task.

        Returns:
            With the figure and the arrays as ``files``.

        Raises:
            ValueError: If a query, stage, class or object does not exist.
        """
        explainer = self.explainer(**options)
        return explainer.explain(open_image(image, explainer.channels)[0], queries, stages, format)

    def _data(self, data: str | None) -> tuple[str, dict[str, Any]]:
        """Return the data set that is named or that it was trained on, and how that one is opened."""
        stored, recipe = self.path / SPLIT, self.recipe
        if data is not None:
            data = str(Path(data).expanduser()) if data.startswith("~") else data
            # Most of a data set without parts was trained on.
            if not (stored.is_file() and recipe and Path(data).resolve() == Path(recipe.data).resolve()):
                return data, {}
        if recipe is None:
            raise ValueError(f"{self.folder.source}: has no recipe that names a data set: name one with --data")
        own: dict[str, Any] = {"root": recipe.root} if "root" in self.definition.data_options else {}
        return recipe.data, own | ({"splitter": Splitter(stored=[stored])} if stored.is_file() else {})

    def evaluate(
        self,
        data: str | None = None,
        device: str | torch.device = "auto",
        image_size: int | None = None,
        precision: str = "fp32",
        fuse: bool = True,
        threads: int | Literal["auto"] | None = None,
        workers: int = 0,
        progress: Progress = _quiet,
        **options: Any,
    ) -> EvalResult:
        """Measure the model on the held-out part of a data set.

        Args:
            data: As a recipe names it; the run's own by default.
            device: To run on; ``auto`` is CUDA where there is one.
            image_size: Side of the images, or the shorter side; the model's own by default.
            precision: fp32, or bf16 or fp16 for autocast.
            fuse: As for `predictor`.
            threads: As for `predictor`.
            workers: Processes that load images.
            progress: Takes the batches and what is done with them, and yields them, as tqdm does.
            options: Of the task: ``root``, ``batch_size``, ``test_size``, ``crop_pct``, ``crop_mode`` and ``interpolation`` of
                classifiers; ``split`` of detectors and segmenters; ``sliding_window``, ``scales`` and ``flip`` of segmenters.

        Raises:
            ValueError: If there is no such data set, its classes differ from the model's, or an option is for another task.
        """
        check_options(self.folder, options)
        task = self.definition
        chosen, own = self._data(data)
        predicting, opening, measuring = (
            {name: options[name] for name in names if name in options}
            for names in (task.predictor_options, task.data_options, task.evaluation_options)
        )
        predictor = self.predictor(device, image_size, precision, fuse, threads, **predicting)
        images = predictor.open_data(chosen, **own | opening)
        if "splitter" in own:
            images.notes = [*images.notes, *own["splitter"].notes]
        return predictor.evaluate(images, workers, progress, **measuring)

    def report(
        self, device: str | torch.device = "auto", workers: int = 0, progress: Progress = _quiet
    ) -> "tuple[EvalResult, Path | None, list[Path]]":
        """Measure the model on the held-out part of its own data, and write report.html and a few examples into its folder.

        Returns:
            What was measured, the path of the report, and those of the examples. Without the report where writing it failed,
            which is logged: the run is whole without it.

        Raises:
            ValueError: If it has no recipe.
        """
        predictor = self.definition.reporter(self.folder, resolve_device(device))  # not fused: attention is looked at too
        data, own = self._data(None)
        images = predictor.open_data(data, **own)
        measured = predictor.evaluate(images, workers, progress)
        report, examples = None, []
        try:
            report = predictor.report(self.path, images, measured)
            examples = predictor.save_examples(self.path, images)
        except Exception as error:  # a full disk, or what a library makes of unusual data
            reason = f"{type(error).__name__}: {one_line(error)}"
            logging.getLogger(__name__).warning(f"{self.path}: the run is complete, but not its report: {reason}")
        self._open.clear()  # a report may take the model to the CPU
        return measured, report, examples

    def export(
        self,
        format: str,
        out: str | Path,
        *,
        features: bool = False,
        with_preprocessing: bool = False,
        half: bool = False,
        check: bool = True,
        int8: str | None = None,
        calibrate: str | None = None,
        data: str | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Write the network for another program, and compare the file with it.

        Args:
            format: onnx, pt2, aoti, openvino, executorch, coreml or litert.
            out: The file.
            features: A classifier's maps of strides 4, 8, 16 and 32, not its logits.
            with_preprocessing: Of a classifier, from an image as a file holds it to probabilities; the file resizes and crops.
            half: In float16, for onnx.
            check: Run the file, and compare it with the network; detectors always are.
            int8: In 8-bit integers, measured beside float32: static for onnx and openvino, weights or dynamic for pt2.
            calibrate: For static, a folder of images; the run's training data by default.
            data: To measure int8 on; the run's own by default.
            progress: Is told what is done.

        Returns:
            As `groupmixformer.deploy.export.export`, `export_detector` or `quantize` say.

        Raises:
            ValueError: If the format cannot carry the network, or the file is not the same function.
            ModuleNotFoundError: If a package that the format needs is missing.
        """
        from .deploy.export import Exported, export, real_image

        out = Path(out).expanduser()
        chosen = {"features": features, "int8": int8, "with_preprocessing": with_preprocessing}
        check_options(self.folder, [name for name, value in chosen.items() if value])
        if features + bool(int8) + with_preprocessing > 1 or (int8 and half):
            raise ValueError("got more than one of features, int8, with_preprocessing (or int8 and half), expected one")
        if int8:
            return self._export_int8(format, out, int8, calibrate, data, progress)
        found = self.definition.exportable(self.folder, format, features)
        image = real_image(self.folder, found.channels)
        if found.gives_objects and (half or not check):
            raise ValueError("half and no check are not for detectors: they are written in float32 and compared")
        if found.gives_objects:
            from .deploy.export_detector import export_detector

            return export_detector(found.network, out, image, found.classes, progress, found.channels.count)
        settings = {"classes": found.classes, "half": half, "check": check, "progress": progress, **found.settings}
        if not with_preprocessing:
            return export(Exported(found.network, features).eval(), format, out, image, **settings)
        from .deploy.preprocessing import WithPreprocessing, compare

        predictor: Any = self.predictor("cpu")
        network = WithPreprocessing(found.network, predictor.config, predictor.several).eval()
        rounding = compare(network, image, predictor.probabilities(predictor.prepare(image)[None])[0])
        return export(network, format, out, image, names=("probabilities",), **settings) | {"rounding": rounding}

    def _export_int8(
        self, format: str, out: str | Path, way: str, calibrate: str | None, data: str | None, progress: Callable[[str], None]
    ) -> dict[str, Any]:
        from .deploy.export import Exported, real_image
        from .deploy.quantize import from_data, from_folder, quantize
        from .tasks.classification.data import eval_loader, eval_transform, open_images

        found = self.definition.exportable(self.folder, format)
        predictor: Any = self.predictor("cpu", fuse=False)
        if predictor.several:
            raise ValueError(
                f"{self.folder.source}: int8 is measured by top-1, and its images have several labels: leave it out"
            )
        skipped: list[str] = []
        if way == "static" and not calibrate and self.recipe is None:
            unknown = f"{self.folder.source}: has no recipe that names its training data"
            raise ValueError(f"{unknown}: name a folder of images with --calibrate")
        measured_on, own = self._data(data)
        held_out = predictor.open_data(measured_on, **own)
        calibration, source = None, calibrate or ""
        if calibrate:
            calibration, skipped = from_folder(source, predictor.config, predictor.channels)
        elif way == "static" and self.recipe is not None:
            source = self.recipe.data
            splitter = self._data(None)[1].get("splitter")
            images = open_images(source, self.recipe.root, splitter=splitter).train(
                eval_transform(predictor.config), 0, predictor.channels
            )
            calibration, skipped = from_data(images, source)
        settings = {"classes": found.classes, **found.settings}
        result = quantize(
            Exported(found.network).eval(),
            format,
            way,
            out,
            real_image(self.folder, predictor.channels),
            eval_loader(held_out),
            calibration,
            source,
            settings,
            progress,
        )
        return result | {"skipped": [*skipped, *result["skipped"]], "notes": list(held_out.notes), "data": measured_on}
