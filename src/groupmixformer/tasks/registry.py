"""The tasks: each is one object that says what the rest of the package asks of it.

A task from outside is a subclass of `TaskSpec`, named by an entry point of the group ``groupmixformer.tasks``; ours are found
in the same way. Nothing that a task needs is imported before it is asked for.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.channels import RGB, Channels
from ..data.samples import Samples
from ..run_folder import CONFIG, WEIGHTS, RunFolder
from ..weights import write_tensors
from .predictor import Predicted, Predictor

if TYPE_CHECKING:  # which bring Lightning, jsonargparse and matplotlib
    from ..training.module import Task
    from ..training.recipe import Recipe
    from .explainer import Explainer

GROUP = "groupmixformer.tasks"
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device) -> torch.device:
    """Return a device by its name; ``auto`` is CUDA where there is one, or else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@dataclass(frozen=True)
class NetworkInfo:
    """What a model card says of a network.

    Attributes:
        name: Of the network, or of its backbone, in timm, as the card shows it.
        about: The first sentence, but for what it is for.
        ours: Whether it is, or has as its backbone, a GroupMixFormer.
        class_names: In the order of the labels, or none.
        facts: About the network, in words.
        use: How to load it: Markdown, with ``{repo_id}`` for its place on the Hub.
    """

    name: str
    about: str
    ours: bool
    class_names: list[str]
    facts: dict[str, str]
    use: str


@dataclass(frozen=True)
class Exportable:
    """A network as it is exported.

    Attributes:
        network: In eval mode: from images (B, C, H, W), normalised, to one tensor or, if it gives lists, a detector.
        classes: Their names, in the order of the outputs.
        settings: input_size, mean, std and maybe names of the outputs, as `groupmixformer.deploy.export.export` takes them.
        gives_objects: Whether it takes a list of images and gives lists of objects, which are compared object by object.
        channels: Of its images.
    """

    network: nn.Module
    classes: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    gives_objects: bool = False
    channels: Channels = RGB


class TaskSpec:
    """What is particular to a task.

    The methods have a default that suits a network saved by `groupmixformer.run_folder.save_network`, or say that the task does
    not have it.

    Attributes:
        name: In recipes and in config.json.
        example_recipe: A shipped recipe for it.
        module_class: Subclass of `groupmixformer.training.module.Task`, as ``package.module:Class``, which is imported when it
            is asked for: its ``from_recipe(recipe, world_size)`` opens the recipe's data and creates what is trained.
        predictor_class: Subclass of `Predictor`, named in the same way.
        explainer_class: Subclass of `groupmixformer.tasks.explainer.Explainer`, named in the same way; empty where the task has
            no explanations.
        hub_name: The Hub's name of it, its pipeline tag.
        hub_tags: Further tags on the Hub.
        hub_library: What loads it, by the Hub's names.
        hub_metrics: Columns of metrics.csv, the one that decides which epoch is best first, each with the Hub's name of the
            metric and ours.
        predictor_options: Keyword arguments of its predictor besides device, size and precision.
        data_options: Those of its predictor's `open_data`.
        evaluation_options: Those of its predictor's `evaluate`.
        explainer_options: Those of its explainer.
        other_options: What else it understands: ``plot`` (an evaluation has a figure), ``out`` (predictions are drawn),
            ``max_batch`` (serves several images at once), ``features`` and ``int8`` (of exports).
        bench_size: Height and width at which `gmf bench` measures, those at which results are published.
        casts_weights: Whether inference in half precision casts the weights; otherwise it is under autocast, for heads that
            are not made for that.
        columns: Of a table of predictions, a CSV file, beside image; see `table`.
        formats: Names of data sets that `write_format` can write what was found as.
        gives_losses: Whether the network takes targets in training and gives losses by name; otherwise it gives logits.
        counts_macs: Whether the multiply-adds of the network are the same for every image.
        published: Whether accuracies of peers are known (`groupmixformer.bench.published`).
    """

    name: str
    example_recipe: str = ""
    module_class: str
    predictor_class: str
    explainer_class: str = ""
    hub_name: str = "other"
    hub_tags: tuple[str, ...] = ()
    hub_library: str = "groupmixformer"
    hub_metrics: Mapping[str, tuple[str, str]] = {}
    predictor_options: tuple[str, ...] = ()
    data_options: tuple[str, ...] = ()
    evaluation_options: tuple[str, ...] = ()
    explainer_options: tuple[str, ...] = ()
    other_options: tuple[str, ...] = ()
    bench_size: tuple[int, int] = (224, 224)
    casts_weights: bool = False
    columns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    gives_losses: bool = False
    counts_macs: bool = True
    published: bool = False

    @property
    def options(self) -> set[str]:
        """All options that mean something to this task and not to every task."""
        kinds = (self.predictor_options, self.data_options, self.evaluation_options, self.explainer_options)
        return {*self.other_options, *(name for names in kinds for name in names)}

    def build_task(self, recipe: "Recipe", world_size: int) -> "Task":
        """Open the recipe's data and create what is trained; settings of a task from outside are in ``recipe.task_options``.

        Raises:
            ValueError: If data or model cannot be used.
        """
        task: Task = resolve_name(self.module_class).from_recipe(recipe, world_size)
        return task

    def open_part(self, data: Path, part: str, recipe: "Recipe | None" = None) -> Samples:
        """Open a part of a data set to look at it, or, with a recipe, to train on it.

        Args:
            data: As `groupmixformer.data.formats.recognise` takes it.
            part: By the name that it has there.
            recipe: Its augmentation is applied to training samples, which are normalised by the statistics of ImageNet.

        Raises:
            ValueError: If the part cannot be used, or the task does not have it.
        """
        raise ValueError(f"{data}: the task {self.name} has no look at data")

    def predictor(
        self, run: RunFolder, device: torch.device, image_size: int | None, dtype: torch.dtype | None, **options: Any
    ) -> Predictor:
        """Open a run to look at images; the options are `predictor_options`."""
        predictor: Predictor = resolve_name(self.predictor_class)(run, device, image_size, dtype, **options)
        return predictor

    def reporter(self, run: RunFolder, device: torch.device) -> Predictor:
        """Open a run to measure it after training and write its report."""
        return self.predictor(run, device, None, None)

    def explainer(self, run: RunFolder, device: torch.device, image_size: int | None, **options: Any) -> "Explainer":
        """Open a run to explain images; the options are `explainer_options`.

        Raises:
            ValueError: If the task has no explanations.
        """
        if not self.explainer_class:
            raise ValueError(f"{run.source}: holds a model for {self.name}, which has no explanations")
        explainer: Explainer = resolve_name(self.explainer_class)(run, device, image_size, **options)
        return explainer

    def load(self, run: RunFolder) -> Any:
        """Return the network of a run, in eval mode on the CPU."""
        return self.predictor(run, torch.device("cpu"), None, None).model

    def class_names(self, run: RunFolder) -> list[str]:
        """Return the names of the classes, in the order of the labels."""
        return list(run.config.get("class_names", []))

    def exportable(self, run: RunFolder, format: str, features: bool = False) -> Exportable:
        """Return the network of a run as it is exported.

        Args:
            run: A run.
            format: onnx, pt2, aoti or openvino.
            features: Whether feature maps are wanted instead of the output.

        Raises:
            ValueError: If the format cannot carry it.
        """
        raise ValueError(f"{run.source}: holds a model for {self.name}, which cannot be exported")

    def bench_network(self, name: str, size: tuple[int, int]) -> nn.Module:
        """Return a new network over a model of timm, as `gmf bench` measures it at a height and width.

        Raises:
            ValueError: If the task has no such network.
        """
        raise ValueError(f"gmf bench has no network for {self.name}")

    def bench_batch(self, images: Tensor, train: bool) -> tuple[Any, Any]:
        """Return what `bench_network` takes for random images (B, 3, H, W), and targets for a training step."""
        return images, torch.randint(0, 100, images.shape[:1], device=images.device) if train else None

    def compiled_part(self, network: nn.Module) -> nn.Module:
        """Return the part of a network that compiles well."""
        return network

    def write_results(self, out: Path, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
        """Write what was found in images that were predicted together, by their paths; return the files by what they hold."""
        return {}

    def table(self, found: Predicted) -> list[dict[str, Any]]:
        """Return what was found in an image as rows with `columns`."""
        return []

    def write_format(
        self, format: str, out: Path, images: Sequence[tuple[str, tuple[int, int], Predicted]], run: RunFolder
    ) -> Path:
        """Write what was found in images, given by path, width and height, as a data set; return the file to begin with.

        Raises:
            ValueError: If it is none of `formats`.
        """
        raise ValueError(f"{run.source}: holds a model for {self.name}, whose predictions cannot be written as {format}")

    def publish(self, run: RunFolder, folder: Path) -> NetworkInfo:
        """Write weights and config.json of a run as they are published, and return what its card says.

        Raises:
            FileNotFoundError: If there is no such run.
            ValueError: If it cannot be read.
        """
        config, tensors = run.read_network(self.name)
        shutil.copyfile(run.path / CONFIG, folder / CONFIG)
        write_tensors(tensors, folder / WEIGHTS[0])
        settings = dict(config["network"])
        backbone = settings.pop("backbone", {"name": self.name, "arguments": {}})
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(statistics))
        facts = {"parameters": f"{parameters / 1e6:.2f} M"}
        facts |= {
            name.replace("_", " "): as_text(value)
            for name, value in (backbone["arguments"] | settings).items()
            if value is not None
        }
        name = f"backbone `{backbone['name']}`"
        ours, channels = backbone["name"].startswith("groupmixformer"), backbone.get("in_chans", 3)
        facts |= {"channels of an image": str(channels)} if channels != 3 else {}
        usage = self.usage if channels == 3 else TaskSpec.usage
        return NetworkInfo(name, f"A network over the {name}", ours, config["class_names"], facts, usage)

    usage = """With groupmixformer:

```python
import groupmixformer

run = groupmixformer.Run.open("hf-hub:{repo_id}")
print(run.predict("image.jpg").text)
```
"""


def as_text(value: Any) -> str:
    """Write numbers and lists as Markdown shows them well."""
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Ours are found as those of others are.
BUILT_IN = {
    name: EntryPoint(name, f"groupmixformer.tasks.{name}:{name.capitalize()}Task", GROUP)
    for name in ("classification", "detection", "segmentation", "pretraining")
}


def task_names() -> list[str]:
    """Names of all tasks, ours first."""
    return [*BUILT_IN, *sorted(entry_points(group=GROUP).names - set(BUILT_IN))]


@cache
def find_task(name: str) -> TaskSpec:
    """Return a task by its name.

    Raises:
        ValueError: If there is none, with the nearest name; or if a package from outside names something else.
    """
    found = BUILT_IN.get(name) or next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        near = get_close_matches(name, task_names(), n=1, cutoff=0.0)[0]
        raise ValueError(f"no task {name}, expected one of {', '.join(task_names())}: the nearest is {near}")
    task = found.load()
    if not (isinstance(task, type) and issubclass(task, TaskSpec)):
        raise ValueError(f"the task {name} is {found.value}, expected a subclass of groupmixformer.tasks.registry.TaskSpec")
    return task()


def build_task(recipe: "Recipe", world_size: int) -> "Task":
    """Open the data of a recipe and create what is trained, whatever the task; for `groupmixformer.training.trainer.train`."""
    return find_task(recipe.task).build_task(recipe, world_size)


def check_options(run: RunFolder, options: Iterable[str], spell: Callable[[str], str] = str) -> None:
    """Refuse options that mean nothing to the task of a run, and say for which of ours they are.

    Args:
        run: Holds a model for a task.
        options: Names of options that are set.
        spell: From its name to what the user typed.

    Raises:
        ValueError: If one has no meaning for the task; says for which it has.
    """
    for option in sorted(set(options) - find_task(run.task).options):
        tasks = [name for name in BUILT_IN if option in find_task(name).options]
        if tasks:
            raise ValueError(f"{spell(option)} is for {' and '.join(tasks)}, and {run.source} holds a model for {run.task}")
        raise ValueError(f"no option {spell(option)}, expected some of {', '.join(sorted(find_task(run.task).options))}")
