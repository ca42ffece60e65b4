"""Commands that use a trained model: eval, predict, explain, serve and demo."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from .common import (
    EXTRAS,
    Device,
    Figure,
    Flip,
    Folder,
    Host,
    Images,
    ImageSize,
    Json,
    Looks,
    NonNegative,
    Option,
    Pixel,
    Port,
    Positive,
    Precision,
    Reads,
    Root,
    Run,
    Scales,
    ScalesOption,
    ScoreThreshold,
    Share,
    SlidingWindow,
    Top,
    UsageError,
    Works,
    Writes,
    command,
    data_of,
    progress,
    show,
    task_of_run,
    torch_device,
    torch_dtype,
)


def _open(
    run: str,
    task: str,
    device: str,
    *,
    image_size: int | None = None,
    top: int = 5,
    sliding_window: bool = False,
    scales: Scales = (1.0,),
    flip: bool = False,
    precision: Precision = "fp32",
) -> Any:
    """Return the model of a run, ready to look at images: its `predict` takes one."""
    if task == "classification":
        from ..tasks.classification.predict import Classes

        return Classes(run, torch_device(device), image_size, top)
    from ..tasks.predictor import Objects, Segments

    settings = (run, torch_device(device), image_size, torch_dtype(precision))
    if task == "detection":
        return Objects(*settings)
    return Segments(*settings, slide=sliding_window, scales=scales, flip=flip)


def _evaluate_scenes(
    scenes: Any, run: str, task: str, data: str, split: str, precision: str, workers: int, per_class: bool, json: bool
) -> None:
    measured = scenes.evaluate(scenes.open(data, split), workers, progress)
    for problem in measured.skipped:
        print(f"gmf eval: skipped {problem}", file=sys.stderr)
    rates = "{images_per_second:.2f} images/s with loading, {model_images_per_second:.2f} the model alone"
    text = f"{measured.text}\non {measured.result['images']:,} images of {split}\n{rates.format(**measured.result)}"
    result = {"run": run, "task": task, "data": data, "split": split, **measured.result, "precision": precision}
    show(result | {"skipped": measured.skipped}, json, f"{text}\n\n{measured.table}" if per_class else text)


@command("eval", "gmf eval runs/quickstart --json", *EXTRAS)
def evaluate(
    run: Run,
    *,
    data: Reads[str | None] = None,
    root: Root = "data",
    split: Reads[str] = "val",
    workers: Reads[NonNegative] = 0,
    device: Device = "auto",
    precision: Works[Precision] = "fp32",
    batch_size: Works[Positive] = 64,
    image_size: ImageSize = None,
    test_size: Looks[bool] = False,
    crop_pct: Looks[Share | None] = None,
    crop_mode: Looks[Literal["center", "squash", "border"] | None] = None,
    interpolation: Looks[Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"] | None] = None,
    sliding_window: SlidingWindow = False,
    scales: ScalesOption = (1.0,),
    flip: Flip = False,
    per_class: Writes[bool] = False,
    plot: Writes[Figure | None] = None,
    json: Json = False,
) -> None:
    """Measure a model on a data set.

    Args:
        data: data set, or a folder of class folders; the run's own by default
        split: for detection and segmentation: the part of the data
        workers: processes that load images
        precision: floating-point type of the computation
        batch_size: for classification: images at once
        test_size: take size and crop that the model stores for tests, if any
        crop_pct: share of the resized image that is kept; the model's own by default
        crop_mode: timm's crops; the model's own by default
        interpolation: how to resize; the model's own by default
        per_class: show the accuracy of every class, the worst first
        plot: write a reliability diagram (.png, .svg or .pdf)
    """
    task = task_of_run(run)
    if task != "classification":
        looks: dict[str, Any] = {"sliding_window": sliding_window, "scales": scales, "flip": flip}
        scenes = _open(run, task, device, image_size=image_size, precision=precision, **looks)
        _evaluate_scenes(scenes, run, task, data or data_of(run)[0], split, precision, workers, per_class, json)
        return

    from ..models.checkpoint import load_model
    from ..tasks.classification.data import eval_loader, open_images
    from ..tasks.classification.metrics import evaluate as evaluate_model
    from ..tasks.classification.metrics import per_class as accuracy_per_class
    from ..tasks.classification.metrics import reliability
    from ..tasks.classification.predict import data_config

    if plot:
        from ..tasks.classification.report import reliability_diagram  # before the work, in case that matplotlib is missing
        from ..visual.figures import write_figure

        plot.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(run).to(torch_device(device))
    if data is None:
        data, root = data_of(run)
    images = open_images(data, root, need_train=False)
    if len(images.class_names) != model.num_classes:
        raise ValueError(f"{data} has {len(images.class_names)} classes and the model {model.num_classes}, expected the same")
    if test_size and not any(model.pretrained_cfg.get(key) for key in ("test_input_size", "test_crop_pct")):
        print(f"gmf eval: {run} stores no size or crop for tests: its usual ones are used", file=sys.stderr)
    crop = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    config = data_config(model, image_size, test_size, **crop)
    loader = eval_loader(images.held_out, config, batch_size, workers)
    evaluation = evaluate_model(model, progress(loader, "evaluating"), torch_dtype(precision))
    for problem in evaluation.problems:
        print(f"gmf eval: skipped {problem}", file=sys.stderr)
    if plot:
        write_figure(reliability_diagram(evaluation), plot)

    metrics, classes = evaluation.metrics, accuracy_per_class(evaluation, images.class_names)
    height, width = config["input_size"][1:]
    lines = [
        f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}  "
        f"calibration error {metrics['calibration_error']:.2%}  on {metrics['images']:,} images",
        f"{height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, {config['interpolation']}, {precision}",
        f"{metrics['images_per_second']:.1f} images/s with loading, {metrics['model_images_per_second']:.1f} the model alone",
    ]
    if per_class:
        # Worst first; classes without images, which have no accuracy, last.
        ranked = sorted(classes, key=lambda row: (row["top1"] is None, row["top1"]))
        length = max(len(name) for name in ("class", *images.class_names))
        lines += [f"\n{'class':{length}}{'images':>8}{'top-1':>9}"]
        lines += [
            f"{row['class']:{length}}{row['images']:>8,}{'-' if row['top1'] is None else format(row['top1'], '.2%'):>9}"
            for row in ranked
        ]
    result = {
        "run": run,
        "data": data,
        **metrics,
        "skipped": evaluation.problems,
        **{key: config[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")},
        "precision": precision,
        "device": str(next(model.parameters()).device),
        "batch_size": batch_size,
        "plot": str(plot) if plot else None,
        "per_class": classes,
        "reliability": reliability(evaluation),
    }
    show(result, json, "\n".join(lines))


def _read(paths: Sequence[Path], command: str, skipped: list[str]) -> Iterator[tuple[Path, Any]]:
    """Read images one by one, with their paths; those that cannot be read are reported and added to `skipped`."""
    from ..data.images import read_image

    for path in progress(paths, command, len(paths)):
        try:
            image = read_image(path)
        except ValueError as error:
            skipped.append(str(path))
            print(f"gmf {command}: skipped {error}", file=sys.stderr)
            continue
        yield path, image
    if len(skipped) == len(paths):
        raise ValueError(f"none of {len(paths)} images could be read")


@command("predict", "gmf predict runs/quickstart 'photos/*.jpg' --top 3", *EXTRAS)
def predict(
    run: Run,
    images: Images,
    *,
    device: Device = "auto",
    image_size: ImageSize = None,
    sliding_window: SlidingWindow = False,
    scales: ScalesOption = (1.0,),
    flip: Flip = False,
    top: Top = 5,
    score_threshold: ScoreThreshold = 0.5,
    out: Writes[Folder] = Path("predictions"),
    json: Json = False,
) -> None:
    """Classify images, or find objects or segments in them.

    Args:
        out: for detection and segmentation: folder of the drawn images
    """
    from ..data.images import find_images
    from ..files import write_prediction

    task = task_of_run(run)
    model = _open(run, task, device, image_size=image_size, top=top, sliding_window=sliding_window, scales=scales, flip=flip)
    rows: list[dict[str, Any]] = []
    coco: list[dict[str, Any]] = []
    skipped: list[str] = []
    lines: list[str] = []
    paths = find_images(images)
    taken = {path.resolve() for path in paths}
    for path, image in _read(paths, "predict", skipped):
        found = model.predict(image, str(path), score_threshold)
        rows.append({"image": str(path), **found.result})
        lines.append(f"{path}: {found.text}")
        coco += found.results
        if found.files:
            rows[-1]["files"] = write_prediction(out, path, found.files, taken)
            lines[-1] += f"  ({', '.join(rows[-1]['files'])})"
    result: dict[str, Any] = {"run": run, "task": task, "images": rows, "skipped": skipped}
    if task == "detection":
        from ..tasks.predictor import write_results

        result["coco_results"] = write_results(out, coco)
        lines.append(f"COCO results: {result['coco_results']}")
    show(result, json, "\n".join(lines))


@command("explain", "gmf explain runs/quickstart photo.jpg --query 120,80 40,200 --stage 1 2", *EXTRAS)
def explain(
    run: Run,
    images: Images,
    *,
    device: Device = "auto",
    image_size: ImageSize = None,
    query: Looks[Sequence[Pixel]] = (),
    stage: Looks[Sequence[Annotated[Literal[0, 1, 2, 3], Option(metavar="N")]]] = (),
    class_: Looks[str | None] = None,
    object_: Looks[NonNegative | None] = None,
    out: Writes[Folder] = Path("explanations"),
    format: Writes[Literal["png", "svg", "pdf"]] = "png",
    json: Json = False,
) -> None:
    """Show what positions of images attend to, and what speaks for a class, an object or a segment.

    Args:
        query: pixels of the image whose attention is shown; by default the most relevant one
        stage: stages 0 to 3 of the attention, the last also of the relevance; by default the deepest that suit the size
        class_: name or number of the class to explain; by default the likeliest, for segments that at the query or the largest
        object_: for detection: the object to explain, 0 the best; by default the nearest to the query, or the best
        out: folder of the figures and arrays
        format: of the figures
    """
    from ..models.checkpoint import task_of

    task = task_of(run)
    for option, value, tasks in (
        ("--class", class_, ("classification", "segmentation")),
        ("--object", object_, ("detection",)),
    ):
        if value is not None and task not in tasks:
            raise UsageError(f"{option} is for {' and '.join(tasks)}, and {run} holds a model for {task}")
    from ..data.images import find_images
    from ..files import write_prediction
    from ..tasks.explainer import open_explainer

    explainer = open_explainer(run, torch_device(device), image_size, class_, object_)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    lines: list[str] = []
    paths = find_images(images)
    taken = {path.resolve() for path in paths}
    for path, image in _read(paths, "explain", skipped):
        try:
            found = explainer.explain(image, query, stage, format)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        figure, arrays = write_prediction(out, path, found.files, taken)
        rows.append({"image": str(path), **found.result, "figure": figure, "arrays": arrays})
        lines.append(f"{path}: {found.text}  ({figure}, {arrays})")
    show({"run": run, "task": task, "images": rows, "skipped": skipped}, json, "\n".join(lines))


@command("serve", "gmf serve runs/quickstart --port 8000", "serve", *EXTRAS)
def serve(
    run: Run,
    *,
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: Works[Positive] = 16,
    queue: Works[Positive] = 64,
    max_megabytes: Works[Positive] = 20,
    fuse: Works[bool] = True,
    image_size: ImageSize = None,
    sliding_window: SlidingWindow = False,
    scales: ScalesOption = (1.0,),
    flip: Flip = False,
    top: Top = 5,
    score_threshold: ScoreThreshold = 0.5,
    json: Json = False,
) -> None:
    """Answer over HTTP: POST an image, get JSON.

    Args:
        max_batch: for classification: images looked at together
        queue: requests taken in at once
        max_megabytes: size of a request
        fuse: take the inference form of a GroupMixFormer (default: yes)
    """
    from ..deploy.serve import Limits, application, listen, server, service
    from ..models.fuse import fuse as inference_form
    from ..models.groupmixformer import GroupMixFormer

    task = task_of_run(run)
    listening, address = listen(host, port)
    with listening:
        looks: dict[str, Any] = {"sliding_window": sliding_window, "scales": scales, "flip": flip}
        model = _open(run, task, device, image_size=image_size, top=top, **looks)
        fused = fuse and any(isinstance(module, GroupMixFormer) for module in model.model.modules())
        if fused:
            model.model = inference_form(model.model)
        limits = Limits(max_batch, queue, max_megabytes)
        serving = service(model, task, limits, score_threshold)
        serving.warm_up()
        name = Path(run).resolve().name
        if json:
            show({"address": address, "model": name, "task": task}, json, "")
        print(
            f"gmf serve: {name} ({task}{', fused' * fused}) at {address}: POST an image to /predict",
            file=sys.stderr,
            flush=True,
        )
        server(application(serving, name, task)).run([listening])


@command("demo", "gmf demo runs/quickstart", "demo", *EXTRAS)
def demo(
    runs: Reads[Sequence[str]],
    *,
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 7860,
    json: Json = False,
) -> None:
    """Open a local page: drop an image, see what is found, click a point and see what it attends to.

    Args:
        runs: folder of a run, checkpoint file, or folder of gmf convert
    """
    from PIL import Image

    from ..deploy.demo import Page, application
    from ..deploy.serve import listen, server
    from ..models.checkpoint import task_of

    listening, address = listen(host, port)
    with listening:
        opened, examples = {}, []
        for run in runs:
            task = task_of(run)
            opened[run] = (_open(run, task, device), task)
            opened[run][0].predict(Image.new("RGB", (64, 64)))  # the first image takes longer
            examples += sorted(str(path) for path in Path(run, "examples").glob("*.png"))
        app = application(Page(opened), examples)
        if json:
            show({"address": address, "runs": list(runs)}, json, "")
        print(f"gmf demo: open {address} in a browser; Ctrl-C ends it", file=sys.stderr, flush=True)
        server(app, patience=1).run([listening])  # a page that is open keeps its connection
