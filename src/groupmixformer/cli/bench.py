"""Commands about models and machines: bench, models and doctor."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from .common import (
    Device,
    Figure,
    File,
    Json,
    Option,
    Positive,
    Precision,
    Reads,
    Side,
    UsageError,
    Works,
    Writes,
    command,
    note,
    progress,
    requirements_of_extras,
    show,
)

Compile = Literal["default", "max-autotune", "reduce-overhead"]


def _task(text: str) -> str:
    from ..tasks.registry import find_task

    try:
        return find_task(text).name
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


@command("bench", "gmf bench small coat_lite_small swin_tiny_patch4_window7_224 --batch-size 4", "train", "segmentation")
def bench(
    models: Reads[Sequence[str]] = ("mobile", "tiny", "small"),
    *,
    baseline: Reads[File | None] = None,
    task: Annotated[Works[str], Option(_task)] = "classification",
    train: Works[bool] = False,
    batch_size: Works[Positive] = 1,
    size: Works[Sequence[Side]] = (),
    precision: Works[Precision] = "fp32",
    compile: Annotated[Works[Compile | None], Option(metavar="MODE", bare="default")] = None,
    fuse: Works[bool] = False,
    contiguous: Works[bool] = False,
    device: Device = "auto",
    threads: Works[Positive | None] = None,
    repeats: Works[Positive] = 7,
    csv: Writes[File | None] = None,
    plot: Writes[Figure | None] = None,
    json: Json = False,
) -> None:
    """Measure speed and memory of models side by side.

    Args:
        models: variants, models of timm
        baseline: an earlier result, saved with --json, to compare with
        task: what the models are built for: classification, detection, segmentation
        train: a training step instead of inference
        batch_size: images at once
        size: height and width; by default 224, 800 1333 or 512, by the task
        precision: floating-point type of the computation
        compile: with torch.compile: default, max-autotune or reduce-overhead (CUDA graphs); weights are frozen on a CPU
        fuse: GroupMixFormers in their inference form, others as they are
        contiguous: other models than ours in contiguous, not channels_last memory
        threads: CPU threads; PyTorch's own number by default
        repeats: measurements of each model
        csv: write the table as CSV too
        plot: draw published accuracy against speed (.png, .svg or .pdf)
    """
    import torch

    from ..bench.published import accuracy_against_speed, at_published_size
    from ..bench.side_by_side import bench as measure
    from ..bench.side_by_side import headline, read_earlier, table
    from ..bench.timing import Settings
    from ..files import write_rows
    from ..models.checkpoint import model_name
    from ..tasks.registry import find_task, resolve_device

    if len(size) > 2:
        raise UsageError(f"--size {' '.join(map(str, size))}: expected a height and a width, or one number for both")
    settings = Settings(
        task=task,
        train=train,
        batch_size=batch_size,
        size=(size[0], size[-1]) if size else find_task(task).bench_size,
        dtype=precision,
        compile=compile,
        fuse=fuse,
        channels_last=not contiguous,
        device=str(resolve_device(device)),
        threads=torch.get_num_threads() if threads is None else threads,
        rounds=repeats,
    )
    earlier = read_earlier(baseline, settings) if baseline else {}
    names = [model_name(model) for model in models]
    if baseline and not set(names) & set(earlier):
        raise ValueError(f"{baseline} has none of {', '.join(names)}")
    if plot:
        from ..visual.figures import write_figure  # before the work, in case that matplotlib is missing

        plotted = at_published_size(names, settings.task, settings.size)
        plot.parent.mkdir(parents=True, exist_ok=True)
    result = measure(models, settings, progress, earlier)
    if plot:
        write_figure(accuracy_against_speed([row for row in result["rows"] if row["model"] in plotted], headline(result)), plot)
        if left := [name for name in names if name not in plotted]:
            note(f"not in the plot, as no accuracy at this size is known: {', '.join(left)}")
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        write_rows(csv, result["rows"])
    show(result, json, table(result))


@command("models", "gmf models --json")
def models(*, json: Json = False) -> None:
    """List the variants."""
    from ..released import VARIANTS

    rows: list[dict[str, Any]] = [
        {
            "name": f"groupmixformer_{name}",
            "parameters": variant.parameters,
            "macs": variant.macs,
            "input_size": [3, variant.image_size, variant.image_size],
            "published_top1": variant.top1,
        }
        for name, variant in VARIANTS.items()
    ]
    table = [f"{'name':27}{'parameters':>12}{'MACs':>10}{'input':>8}{'published top-1':>17}"]
    table += [
        f"{r['name']:27}{r['parameters'] / 1e6:>10.2f} M{r['macs'] / 1e9:>8.2f} G{r['input_size'][1]:>8}"
        f"{r['published_top1']:>15.1f} %"
        for r in rows
    ]
    show({"models": rows}, json, "\n".join(table))


@command("doctor", "gmf doctor --json")
def doctor(*, json: Json = False) -> None:
    """Tell versions, devices, and which extras of the package are complete."""
    import os
    import platform
    import textwrap
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    needs = requirements_of_extras()
    names = ["groupmixformer", "torch", "torchvision", "timm", *(need.name for extra in needs.values() for need in extra)]
    versions = {name: installed(name) for name in dict.fromkeys(names)}
    extras: dict[str, dict[str, Any]] = {}
    for extra, requirements in needs.items():
        missing = [
            f"{need.name}{need.specifier}" + (f" ({found} is installed)" if found else "")
            for need in requirements
            if (found := versions[need.name]) is None or not need.specifier.contains(found, prereleases=True)
        ]
        install = f"pip install 'groupmixformer[{extra}]'" if missing else None
        extras[extra] = {"complete": not missing, "missing": missing, "install": install}
    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "torch_build": {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()},
        "devices": ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])],
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "extras": extras,
    }
    build = ", ".join(f"{name} {known}" for name, known in result["torch_build"].items() if known) or "CPU only"
    packages = ", ".join(f"{name} {known}" for name, known in versions.items() if known)
    lines = [
        f"python    {result['python']}, {result['platform']}",
        textwrap.fill(f"packages  {packages}", 100, subsequent_indent=" " * 10, break_on_hyphens=False),
        f"torch     built for {build}",
        f"devices   {', '.join(result['devices'])}",
        f"CPU       {result['cpu']['capability']}, {result['cpu']['cores']} cores, {result['cpu']['threads']} threads",
        "extras    " if extras else "extras    not known: groupmixformer is not installed as a package",
    ]
    for extra, state in extras.items():
        missing = state["missing"]
        few = [*missing[:2], *([f"{len(missing) - 2} more"] if len(missing) > 2 else [])]
        lines.append(f"  {extra:14}" + (f"missing {', '.join(few)}: {state['install']}" if missing else "complete"))
    show(result, json, "\n".join(line.rstrip() for line in lines))
