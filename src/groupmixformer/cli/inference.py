"""Commands that use a trained model: eval, predict, explain, serve and demo."""

import io
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..files import free_stem, printable, read_text, write_prediction, write_rows
from .common import (
    EXTRAS,
    AccessLog,
    AllowedHosts,
    AllowNonfinite,
    Device,
    Figure,
    File,
    Flip,
    Folder,
    Fuse,
    Host,
    Images,
    ImageSize,
    Json,
    Looks,
    NonNegative,
    Option,
    Origin,
    PathText,
    Pixel,
    Port,
    Positive,
    Precision,
    Reads,
    Root,
    RunPath,
    ScalesOption,
    ScoreThreshold,
    Share,
    SlidingWindow,
    Threads,
    Tile,
    Top,
    UsageError,
    Works,
    Writes,
    command,
    note,
    open_run,
    progress,
    show,
    tell,
)

if TYPE_CHECKING:
    from ..data.channels import AnyImage, Channels
    from ..tasks.predictor import Predicted


@command("eval", "gmf eval runs/quickstart --json", *EXTRAS)
def evaluate(
    run: RunPath,
    *,
    allow_nonfinite: AllowNonfinite = False,
    data: Reads[PathText | None] = None,
    root: Root = "data",
    split: Reads[str] = "val",
    workers: Reads[NonNegative] = 0,
    device: Device = "auto",
    threads: Threads = None,
    fuse: Fuse = True,
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
    tile: Tile = None,
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
    crop = {"test_size": test_size, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    looks = {"sliding_window": sliding_window, "scales": scales, "flip": flip, "tile": tile}
    reads = {"root": root, "split": split, "batch_size": batch_size}
    opened, options = open_run(run, {**reads, **crop, **looks}, "plot", allow_nonfinite=allow_nonfinite)
    if plot:
        from ..visual.figures import write_figure  # before the work, in case that matplotlib is missing

        plot.parent.mkdir(parents=True, exist_ok=True)
    measured = opened.evaluate(data, device, image_size, precision, fuse, threads or "auto", workers, progress, **options)
    stored = opened.config.get("pretrained_cfg", {})
    if test_size and not any(stored.get(key) for key in ("test_input_size", "test_crop_pct")):
        note(f"{run} stores no size or crop for tests: its usual ones are used")
    tell(measured.notes, measured.skipped)
    if plot:
        figure = measured.figure()
        assert figure is not None
        write_figure(figure, plot)
    part = {"split": split} if "split" in opened.definition.data_options else {}
    rates = "{images_per_second:.2f} images/s with loading, {model_images_per_second:.2f} the model alone"
    lines = [
        f"{measured.text}\non {measured.result['images']:,} images{' of '.join(['', *part.values()])}",
        ", ".join(filter(None, [measured.details, precision])),
        rates.format(**measured.result),
        *([f"\n{measured.table}"] if per_class else []),
    ]
    source = data or (opened.recipe.data if opened.recipe else None)
    result = {"run": run, "task": opened.task, "data": source, **part, **measured.result, "precision": precision}
    result |= {"plot": str(plot) if plot else None, "skipped": measured.skipped}
    show(result, json, "\n".join(lines))


class _Seen:
    """Looks at images one by one and writes the files that are made of them; those that cannot be read are reported.

    Args:
        out: Folder of the files.
        look: From an image and its path to what is found.
        channels: How images are read.

    Attributes:
        rows: What was found, for JSON.
        lines: The same in a line for each image.
        found: Paths with sizes and what was found; of frames, the paths that they would have as files.
        skipped: Paths that could not be read.
    """

    def __init__(self, out: Path, look: "Callable[[AnyImage, str], Predicted]", channels: "Channels") -> None:
        self.out, self.look, self.channels = out, look, channels
        self.rows: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.found: list[tuple[str, tuple[int, int], Predicted]] = []
        self.skipped: list[str] = []
        self.taken: set[Path] = set()
        self.doubts: list[str] = []

    def _add(self, image: "AnyImage", path: str, name: str, **about: Any) -> "Predicted":
        found = self.look(image, path)
        self.rows.append({"image": name, **about, **found.result})
        self.lines.append(
            printable(" ".join([f"{name}:", *(f"{key} {value:.6g}" for key, value in about.items()), found.text]))
        )
        self.found.append((path, image.size, replace(found, files={})))  # which are written, and would fill the memory
        return found

    def read(self, path: Path) -> "AnyImage":
        """Read an image, and keep what is to be said of it."""
        from ..data.images import noted
        from ..data.samples import note_problems

        with noted() as notes:
            image = self.channels.read(path)
        self.doubts += note_problems(notes)
        return image

    def image(self, image: "AnyImage", path: Path) -> None:
        """Look at an image."""
        if files := self._add(image, str(path), str(path)).files:
            self.rows[-1]["files"] = write_prediction(self.out, path, files, self.taken)
            self.lines[-1] += printable(f"  ({', '.join(self.rows[-1]['files'])})")

    def video(self, source: str, every: int, most: int | None) -> None:
        """Look at the frames of a video, and write what is drawn of them as a video."""
        from PIL import Image

        from ..data.video import Video, is_stream, write_video

        if self.channels.count != 3:
            raise ValueError(f"{source}: a video has 3 channels, and the run is for {self.channels.count}: give images")
        video = Video(source, every, most)
        path = Path(source.partition(":")[0] if is_stream(source) else source)  # webcam, rtsp, ...
        before = len(self.rows)

        def drawn() -> "Iterator[Image.Image]":
            try:
                for number, seconds, image in progress(video, source):
                    found = self._add(image, f"{path.with_suffix('')}-{number:06}.png", source, frame=number, seconds=seconds)
                    if found.files:
                        yield Image.open(io.BytesIO(next(iter(found.files.values()))))
            except KeyboardInterrupt:
                if not is_stream(source):
                    raise
            except ValueError as error:
                if len(self.rows) == before:
                    raise
                note(f"{error}, after {len(self.rows) - before} frames")

        written = self.out / f"{free_stem(self.out, path, ['.mp4'], self.taken)}.mp4"
        if write_video(written, drawn(), video.rate):
            self.lines.append(printable(f"{source}: {written}"))
            for row in self.rows[before:]:
                row["files"] = [str(written)]


def _each(
    command: str,
    images: Sequence[str],
    out: Path,
    look: "Callable[[AnyImage, str], Predicted]",
    channels: "Channels",
    every: int | None = None,
    most: int | None = None,
) -> _Seen:
    """Look at images, and unless `every` is none at each such frame of videos.

    Raises:
        ValueError: If none can be read.
    """
    from ..data.images import describe_left_out, find_images
    from ..data.samples import Doubts
    from ..data.video import is_stream, is_video

    left_out: Counter[str] = Counter()
    streams = [name for name in images if every and is_stream(name)]
    paths: list[Any] = [*find_images([name for name in images if name not in streams], left_out), *streams]
    for line in describe_left_out(left_out):
        note(line)
    seen = _Seen(out, look, channels)
    seen.taken = {path.resolve() for path in paths if isinstance(path, Path)}
    for path in progress(paths, command, len(paths)):
        try:
            if every and is_video(str(path)):
                seen.video(str(path), every, most)
                continue
            image = seen.read(path)
        except ValueError as error:
            seen.skipped.append(str(path))
            note(f"skipped {error}")
            continue
        seen.image(image, path)
    Doubts().take(seen.doubts)
    if not seen.rows:
        raise ValueError(f"none of {len(paths)} images could be read")
    return seen


@command("predict", "gmf predict runs/quickstart 'photos/*.jpg' --top 3", *EXTRAS, "formats", "video")
def predict(
    run: RunPath,
    images: Images,
    *,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    threads: Threads = None,
    fuse: Fuse = True,
    image_size: ImageSize = None,
    sliding_window: SlidingWindow = False,
    scales: ScalesOption = (1.0,),
    flip: Flip = False,
    tile: Tile = None,
    top: Top = 5,
    score_threshold: ScoreThreshold = 0.5,
    every: Reads[Positive] = 1,
    frames: Reads[Positive | None] = None,
    out: Writes[Folder] = Path("predictions"),
    format: Writes[Literal["json", "csv", "coco", "yolo", "voc"]] = "json",
    json: Json = False,
) -> None:
    """Classify images, videos and streams (webcam, rtsp://...), or find objects or segments in them.

    Args:
        every: of videos and streams: look at each frame of this number
        frames: of videos and streams: look at so many at most; Ctrl-C ends a stream as well
        out: folder of what is written: drawn images, and files of `--format`
        format: of the predictions: json is COCO's results for detection, csv a table for any task; coco, yolo and voc are
            data sets of what a detector found
    """
    looks = {"sliding_window": sliding_window, "scales": scales, "flip": flip, "tile": tile}
    looks |= {"top": top, "score_threshold": score_threshold}
    others = ["out"] if format == "json" else []
    opened, options = open_run(run, looks, *others, allow_nonfinite=allow_nonfinite)
    task = opened.definition
    known = ["json", *(["csv"] if task.columns else []), *task.formats]
    if format not in known:
        raise UsageError(f"--format {format}: {run} holds a model for {task.name}, expected {', '.join(known)}")
    predictor = opened.predictor(device, image_size, fuse=fuse, threads=threads or "auto", **options)
    seen = _each("predict", images, out, predictor.predict, predictor.channels, every, frames)
    if format == "csv":
        table = [{"image": path, **row} for path, _, one in seen.found for row in task.table(one)]
        write_rows(out / "predictions.csv", table, ["image", *task.columns])
        written = {"predictions": str(out / "predictions.csv")}
    elif format == "json":
        written = task.write_results(out, {path: one.results for path, _, one in seen.found})
    else:
        written = {format: str(task.write_format(format, out, seen.found, opened.folder))}
    lines = [*seen.lines, *(f"{name.replace('_', ' ')}: {file}" for name, file in written.items())]
    result = {"run": run, "task": opened.task, "images": seen.rows, "skipped": seen.skipped, **written}
    show(result, json, "\n".join(lines))


@command("explain", "gmf explain runs/quickstart photo.jpg --query 120,80 40,200 --stage 1 2", *EXTRAS)
def explain(
    run: RunPath,
    images: Images,
    *,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    image_size: ImageSize = None,
    query: Looks[Sequence[Pixel]] = (),
    stage: Looks[Sequence[Annotated[Literal[0, 1, 2, 3], Option(metavar="N")]]] = (),
    wanted_class: Annotated[Looks[str | None], Option(name="class", metavar="CLASS")] = None,
    wanted_object: Annotated[Looks[NonNegative | None], Option(name="object")] = None,
    out: Writes[Folder] = Path("explanations"),
    format: Writes[Literal["png", "svg", "pdf"]] = "png",
    json: Json = False,
) -> None:
    """Show what positions of images attend to, and what speaks for a class, an object or a segment.

    Args:
        query: pixels of the image whose attention is shown; by default the most relevant one
        stage: stages 0 to 3 of the attention, the last also of the relevance; by default the deepest that suit the size
        wanted_class: name or number of the class to explain; by default the likeliest, for segments the one at the query
            or the largest
        wanted_object: for detection: the object to explain, 0 the best; by default the nearest to the query, or the best
        out: folder of the figures and arrays
        format: of the figures
    """
    opened, options = open_run(
        run, {"wanted_class": wanted_class, "wanted_object": wanted_object}, allow_nonfinite=allow_nonfinite
    )
    explainer = opened.explainer(device, image_size, **options)

    def look(image: "AnyImage", path: str) -> "Predicted":
        try:
            return explainer.explain(image, query, stage, format)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    seen = _each("explain", images, out, look, explainer.channels)
    if explainer.backbone is None:
        note(f"{run}: has no Group-Mix Attention to show{' at --query' * bool(query)}: figures show what speaks for the answer")
    for row in seen.rows:
        row["figure"], row["arrays"] = row.pop("files")
    result = {"run": run, "task": opened.task, "images": seen.rows, "skipped": seen.skipped}
    show(result, json, "\n".join(seen.lines))


def _keys(file: Path | None) -> list[str]:
    """Return the API keys: the lines of a file, or that of the environment."""
    keys = (read_text(file) if file else os.environ.get("GMF_API_KEY", "")).split("\n")
    keys = [key.strip() for key in keys if key.strip()]
    if file and not keys:
        raise ValueError(f"{file}: holds no API key, expected one a line")
    return keys


@command("serve", "gmf serve runs/quickstart --port 8000", "serve", *EXTRAS)
def serve(
    runs: Reads[Sequence[PathText]],
    *,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    threads: Threads = None,
    fuse: Fuse = True,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: Works[Positive] = 16,
    queue: Works[Positive] = 64,
    max_megabytes: Works[Positive] = 20,
    max_connections: Works[Positive] = 512,
    max_per_client: Works[Positive] = 32,
    allowed_hosts: AllowedHosts = (),
    api_key_file: Works[File | None] = None,
    cors_origin: Works[Sequence[Origin]] = (),
    reload: Works[bool] = True,
    image_size: ImageSize = None,
    sliding_window: SlidingWindow = False,
    scales: ScalesOption = (1.0,),
    flip: Flip = False,
    tile: Tile = None,
    top: Top = 5,
    score_threshold: ScoreThreshold = 0.5,
    access_log: AccessLog = False,
    json: Json = False,
) -> None:
    """Answer over HTTP: POST images, get JSON.

    Args:
        runs: folder of a run or of gmf convert, checkpoint file, or hf-hub:user/name; several are asked for by name
        max_batch: for classification: images looked at together
        queue: images taken in at once
        max_megabytes: size of a request
        max_connections: open at once; fewer if the limit of open files is low
        max_per_client: images of one address taken in at once
        api_key_file: keys, one a line; requests bring one (default: GMF_API_KEY)
        cors_origin: sites whose pages may send requests: https://lab.example, '*' for any
        reload: load a run again when its weights change (default: yes), as SIGHUP does
    """
    from ..deploy.reload import Reloader, Source, checksum
    from ..deploy.routes import application
    from ..deploy.serve import Limits, Model, Service, served
    from ..deploy.server import listen, server

    looks = {"sliding_window": sliding_window, "scales": scales, "flip": flip, "tile": tile}
    looks |= {"top": top, "score_threshold": score_threshold}
    keys = _keys(api_key_file)

    def source(path: str) -> Source:
        def load() -> Model:
            opened, options = open_run(path, looks, "max_batch", allow_nonfinite=allow_nonfinite)
            weights = checksum(opened.folder)
            predictor = opened.predictor(device, image_size, fuse=fuse, threads=threads or "auto", **options)
            return served(predictor, Path(path).resolve().name, opened.task, weights)

        return Source(open_run(path, looks, "max_batch", allow_nonfinite=allow_nonfinite)[0].folder, load)

    sources = [source(path) for path in runs]
    listening, address = listen(host, port)
    with listening:
        models = [one.load() for one in sources]
        serving = Service(models, Limits(max_batch, queue, max_megabytes, max_per_client))
        reloader = Reloader(serving, dict(zip(serving.models, sources, strict=True)), reload)
        app = application(serving, keys, cors_origin, reloader)
        running = server(app, listening, host, allowed_hosts, max_connections, access_log)
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, lambda *_: reloader.ask())
        about = [{"model": one.name, "task": one.task, "weights": one.weights} for one in models]
        if json:
            show({"address": address, **about[0], "models": about}, json, "")
        named = ", ".join(f"{one.name} ({one.task}{', fused' * one.fused})" for one in models)
        where = "/predict" if len(models) == 1 else "/predict/NAME"
        print(f"gmf serve: {named} at {address}: POST an image to {where}", file=sys.stderr, flush=True)
        running.run([listening])


@command("demo", "gmf demo runs/quickstart", "demo", *EXTRAS)
def demo(
    runs: Reads[Sequence[PathText]],
    *,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 7860,
    allowed_hosts: AllowedHosts = (),
    access_log: AccessLog = False,
    json: Json = False,
) -> None:
    """Open a local page: drop an image, see what is found, click a point and see what it attends to.

    Args:
        runs: folder of a run, checkpoint file, or folder of gmf convert
    """
    from PIL import Image

    from ..deploy.demo import Page, application
    from ..deploy.server import listen, server
    from ..run import Run

    listening, address = listen(host, port)
    with listening:
        predictors, examples = {}, []
        for path in runs:
            run = Run.open(path, allow_nonfinite)
            predictors[path] = run.predictor(device, fuse=False)  # the inference form has no attention to show
            if (count := predictors[path].channels.count) != 3:
                raise ValueError(
                    f"{path}: is for {count} channels, and the page is for colours: take gmf predict, explain or serve"
                )
            predictors[path].predict(Image.new("RGB", (64, 64)))  # the first image takes longer
            examples += sorted(str(example) for example in run.folder.examples.glob("*.png"))
        app = application(Page(predictors), examples)
        # An open page keeps its connection: one second, then it is cut.
        running = server(app, listening, host, allowed_hosts, access_log=access_log, patience=1)
        if json:
            show({"address": address, "runs": list(runs)}, json, "")
        print(f"gmf demo: open {address} in a browser; Ctrl-C ends it", file=sys.stderr, flush=True)
        running.run([listening])
