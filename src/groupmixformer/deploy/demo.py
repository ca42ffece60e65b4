"""A page to try runs on: drop an image, see what is found in it, click a point and see what it attends to.

Nothing is loaded from elsewhere and nothing is sent anywhere: gradio brings its fonts and scripts, and what it would report and
look up is switched off before it is imported.

Only what was uploaded is read. A request names its file by a path, which gradio takes as it comes in an application that is
mounted and not launched, and it loads URLs. So requests are checked before gradio sees them, gradio is told to check paths, and
the page itself opens no file outside the folder of uploads, which is the demo's own and goes with it.
"""

import html
import io
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from fastapi import FastAPI
from PIL import Image, ImageDraw
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..data.images import UPLOAD_SUFFIXES, decode
from ..files import to_json
from ..models.attention_maps import has_attention_maps, overlays, suited_stage
from ..visual.figures import GROUPS, ORANGE
from ..visual.page import Shown, html_figure
from .model_card import markdown

SIDE = 640  # longer side of an image on the page
MEGABYTES = 20  # of an uploaded file
API = "/gradio_api"
UPLOAD = f"{API}/upload"
# The other requests that the page makes, all of JSON. Those of run/ load examples.
POSTS = tuple(f"{API}/{name}" for name in ("queue/join", "run/", "cancel", "reset"))

ABOUT = """# GroupMixFormer
Drop an image or choose an example to see what the model finds in it. Click a point of the image to see what the token there
attends to: single tokens, and groups of tokens of three sizes.
Where there is an orange frame, the model sees what is inside."""
ATTENDS = """## What the point attends to
Each map shows how strongly it attends to every position, yellow the most, in the last block of a stage."""
CSS = """
main { width: 100%; max-width: 80rem; margin: 0 auto !important; }
#samples .gallery-item, #samples .gallery-item div { padding: 0; width: 4rem; height: 4rem; overflow: hidden; }
#samples img { width: 100%; height: 100%; object-fit: cover; }
#shown:not(:has(img)) { height: 16rem; }
#maps > div { padding: 0; }
.maps { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: var(--layout-gap); }
@media (min-width: 48rem) { .maps { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
.maps figure { margin: 0; text-align: center; }
.maps img { width: 100%; border-radius: var(--radius-md); }
"""


@dataclass(frozen=True)
class DemoResult:
    """What a run sees in an image.

    Attributes:
        shown: The image as the page shows it, with a frame around what the model sees if that is less.
        classes: Probabilities by name, for a classifier.
        drawn: The image with boxes, masks or segments, for other tasks.
        text: What was found in a line, for several labels and for other tasks.
        milliseconds: That the model took, preparing and drawing included.
    """

    shown: Image.Image
    classes: dict[str, float] | None
    drawn: Image.Image | None
    text: str
    milliseconds: float


def _inside(path: object, folder: Path) -> bool:
    """Tell whether a path, of which nothing is known, leads to something in a folder, links followed."""
    try:
        return isinstance(path, str) and Path(path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a circle of links
        return False


def _paths(value: Any) -> Iterator[object]:
    """Yield what JSON gives as paths of files, at any depth."""
    if isinstance(value, dict):
        yield from (value["path"],) if "path" in value else ()
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)


class _Gate:
    """ASGI: passes on to gradio what the page itself asks for, and files only by paths of uploads."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                receive = await self._check(scope, receive)
            except HTTPException as refused:
                await JSONResponse({"detail": refused.detail}, refused.status_code)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive) -> Receive:
        path = scope["path"].rstrip("/")
        reads = scope["method"] in ("GET", "HEAD")
        if "://" in path or not (reads or path == UPLOAD or path.startswith(POSTS)):  # gradio would load what a URL names
            raise HTTPException(404, "not found")
        most = (MEGABYTES + 1) * 1_000_000

        async def bounded() -> Message:
            nonlocal most
            message = await receive()
            most -= len(message.get("body", b""))
            if most < 0:
                raise HTTPException(413, f"the request is over {MEGABYTES} MB, the maximum allowed size")
            return message

        if reads or path == UPLOAD:
            return bounded
        try:
            asked = json.loads(await Request(scope, bounded).body())
            named = list(_paths(asked))
        except (ValueError, RecursionError):
            raise HTTPException(400, "expected JSON") from None
        if not all(_inside(one, self._folder) for one in named):
            raise HTTPException(403, "names a file that was not uploaded")
        body = to_json(asked).encode()  # what was checked, and no other reading of the same bytes

        async def replay() -> Message:
            nonlocal body
            if not body:
                return await receive()  # the end of the connection
            message, body = {"type": "http.request", "body": body}, b""
            return message

        return replay


def _for_the_page(image: Image.Image) -> Image.Image:
    factor = SIDE / max(image.size)
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)


class Page:
    """What the page does, without the page.

    Args:
        runs: Predictors by the names of their runs.
        folder: The only one whose files are read; any by default.
    """

    def __init__(self, runs: Mapping[str, Any], folder: Path | None = None) -> None:
        self.runs, self.folder = dict(runs), folder

    def _read(self, run: str, file: str) -> Image.Image:
        if self.folder and not _inside(file, self.folder):
            raise ValueError(f"{Path(file).name}: not uploaded")
        return decode(Path(file), Path(file).name, self.runs[run].max_pixels)

    def predict(self, run: str, file: str) -> DemoResult:
        """Look at an image.

        Raises:
            ValueError: If it cannot be read; says why in a line.
        """
        predictor = self.runs[run]
        image = self._read(run, file)
        start = time.perf_counter()
        found = predictor.predict(image, Path(file).name)
        milliseconds = 1000 * (time.perf_counter() - start)
        shown = _for_the_page(image)
        if "classes" not in found.result:
            drawn = next((Image.open(io.BytesIO(content)) for content in found.files.values()), None)
            return DemoResult(shown, None, drawn, found.text, milliseconds)
        left, top, right, bottom = predictor.frame(shown)
        if max(left, top, shown.width - right, shown.height - bottom) > SIDE / 100:
            ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline=ORANGE, width=2)
        if every := found.result.get("probabilities"):  # of several labels
            return DemoResult(shown, every, None, found.text, milliseconds)
        classes: dict[str, float] = {}
        for one in found.result["classes"]:  # ImageNet has two cranes
            name = f"{one['class']} ({one['index']})" if one["class"] in classes else one["class"]
            classes[name] = one["probability"]
        return DemoResult(shown, classes, None, "", milliseconds)

    def attend(self, run: str, file: str, point: tuple[float, float], stage: int) -> list[tuple[Image.Image, str]]:
        """Show what a point attends to.

        Args:
            run: Name of the run.
            file: The image.
            point: Shares of the image's width and height, from the top left.
            stage: From 0 to 3.

        Returns:
            Four images of what the model sees, the point marked and the strength of attention laid over, each with the size
            of the groups that are compared.

        Raises:
            ValueError: If the run holds no classifier with Group-Mix Attention, or the model does not see this point.
        """
        predictor = self.runs[run]
        if not has_attention_maps(predictor.model):
            raise ValueError(
                f"{run} holds a {type(predictor.model).__name__}: attention is shown for classifiers with Group-Mix Attention"
            )
        image = self._read(run, file)
        view = predictor.view(image)
        try:
            query = view.to_input([int(share * side) for share, side in zip(reversed(point), view.original, strict=True)])
        except ValueError as error:
            raise ValueError("the model does not see this point: it looks at what is inside the orange frame") from error
        strengths = overlays(predictor.model, view.images[0], query, stage).numpy()  # (4, H, W)
        grey, colors = view.pixels.mean(axis=2, keepdims=True) / 255, mpl.colormaps["viridis"]  # grey: (H, W, 1)
        place = [(at + 0.5) / side for at, side in zip(reversed(query), reversed(grey.shape[:2]), strict=True)]
        maps = ((0.35 * grey + 0.65 * colors(strength)[..., :3]) * 255 for strength in strengths)
        images = (_for_the_page(Image.fromarray(pixels.round().astype(np.uint8))) for pixels in maps)
        return [(_mark(image, place), name) for image, name in zip(images, GROUPS, strict=True)]


def _mark(image: Image.Image, point: Sequence[float]) -> Image.Image:
    """Draw a cross at shares of an image's width and height, and return the image."""
    (x, y), arm, pen = (np.multiply(point, image.size), SIDE // 30, ImageDraw.Draw(image))
    for color, wide in (("white", 14), (ORANGE, 8)):
        pen.line((x - arm, y - arm, x + arm, y + arm), color, wide)
        pen.line((x - arm, y + arm, x + arm, y - arm), color, wide)
    return image


def application(page: Page, examples: Sequence[str] = ()) -> FastAPI:
    """Return the page as a web application.

    Args:
        page: What it does.
        examples: Files of images to try.
    """
    temporary = tempfile.TemporaryDirectory(prefix="gmf-demo-")
    folder = Path(temporary.name).resolve()
    page = Page(page.runs, folder)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder)}
    import gradio as gr

    names = list(page.runs)

    def refuse(error: ValueError) -> gr.Error:
        return gr.Error(html.escape(str(error)), print_exception=False)

    def see(run: str, file: str | None) -> list[Any]:
        maps = has_attention_maps(page.runs[run].model)
        attends, prompt = gr.Column(visible=maps), "Click a point" if maps else "Image"
        if file is None:
            return [
                None,
                gr.Image(None, label=prompt),
                gr.Label(None, visible=True),
                gr.Image(None, visible=False),
                "",
                None,
                None,
                attends,
            ]
        try:
            seen = page.predict(run, file)
        except ValueError as error:
            raise refuse(error) from error
        label = gr.Label(seen.classes, visible=seen.classes is not None)
        drawn = gr.Image(seen.drawn, visible=seen.drawn is not None)
        said = f"{markdown(seen.text)}\n\n{seen.milliseconds:.0f} ms"
        return [seen.shown, gr.Image(seen.shown, label=prompt), label, drawn, said, None, None, attends]

    def attend(run: str, file: str | None, stage: int, point: tuple[float, float] | None) -> str | None:
        if file is None or point is None:
            return None
        try:
            maps = page.attend(run, file, point, stage)
        except ValueError as error:
            raise refuse(error) from error
        return f'<div class="maps">{"".join(html_figure(Shown(image, name), SIDE) for image, name in maps)}</div>'

    def click(run: str, file: str | None, stage: int, image: Image.Image | None, event: gr.SelectData) -> Any:
        if image is None or None in event.index:  # the image was still on its way to the browser
            return gr.skip(), gr.skip(), gr.skip()
        point = ((event.index[0] + 0.5) / image.width, (event.index[1] + 0.5) / image.height)
        maps = attend(run, file, stage, point)
        return point, _mark(image.copy(), point), maps

    with gr.Blocks(title="GroupMixFormer", fill_width=True, analytics_enabled=False) as blocks:
        point, image = gr.State(None), gr.State(None)  # image: as it is shown, without the mark of the point
        gr.Markdown(ABOUT, elem_id="about")
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                run = gr.Dropdown(names, value=names[0], label="Run", visible=len(names) > 1, elem_id="run")
                suffixes = sorted(UPLOAD_SUFFIXES)
                file = gr.File(label="Image", file_types=suffixes, height=140, elem_id="file")
                paths = [*{Path(path).read_bytes(): str(Path(path).resolve()) for path in examples}.values()]  # each once
                if paths:
                    thumbnails = gr.Image(type="filepath", render=False)
                    samples = gr.Dataset(
                        label="Examples",
                        components=[thumbnails],
                        samples=[[path] for path in paths],
                        type="index",
                        elem_id="samples",
                    )
            with gr.Column(scale=3, min_width=280):
                shown = gr.Image(label="Click a point", interactive=False, buttons=[], elem_id="shown")
            with gr.Column(scale=3, min_width=280):
                label = gr.Label(label="Classes", elem_id="classes")
                drawn = gr.Image(label="Found", interactive=False, buttons=[], visible=False, elem_id="drawn")
                said = gr.Markdown(elem_id="said", latex_delimiters=[])
        first = page.runs[names[0]]
        with gr.Column(visible=has_attention_maps(first.model)) as attends:
            stages = [(f"{stage}: tokens of {4 * 2**stage} pixels", stage) for stage in range(4)]
            input_size = first.config.get("input_size", (3, 224, 224))  # others have no maps to show
            start = suited_stage(input_size[1:], range(3))
            gr.Markdown(ATTENDS)
            stage = gr.Radio(stages, value=start, label="Stage", elem_id="stage")
            maps = gr.HTML(elem_id="maps")

        found, one = (
            [image, shown, label, drawn, said, point, maps, attends],
            {"concurrency_id": "model", "api_visibility": "private"},
        )
        gr.on([file.change, run.change], see, [run, file], found, **one)
        if paths:
            samples.click(lambda number: paths[number], samples, file, api_visibility="private")
        shown.select(click, [run, file, stage, image], [point, shown, maps], **one)  # type: ignore[arg-type]
        stage.change(attend, [run, file, stage, point], maps, **one)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"footer_links": [], "run_history": False, "show_error": False, "ssr_mode": False}
    settings |= {"max_file_size": f"{MEGABYTES}mb", "enable_monitoring": False, "pwa": False, "css": CSS}

    @asynccontextmanager
    async def cleaning(_: FastAPI) -> AsyncIterator[None]:
        with temporary:
            yield

    app = gr.mount_gradio_app(FastAPI(docs_url=None, redoc_url=None, lifespan=cleaning), blocks, "/", **settings)
    blocks.has_launched = True  # else gradio checks no paths
    app.add_middleware(_Gate, folder=folder)
    return app
