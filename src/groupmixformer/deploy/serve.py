"""A model behind HTTP: POST an image, get JSON.

Images that arrive together are looked at together. LitServe (0.2.19) does that too, but the queue to its workers has no
bound, they are processes that it terminates with what still waits for them, and it exports no metrics. What is left to write is
short: requests wait in one event loop, and one thread runs the model.
"""

import asyncio
import io
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ..data.images import decode
from ..files import to_json

BODY_SECONDS = 30.0  # to send an image in
GATHER_SECONDS = 0.005  # that an image waits for others which are on their way
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        batch: Images that the model looks at together.
        queue: Requests that are taken in and not yet answered; more are turned away.
        megabytes: Size of a request's body.
        per_client: Requests of one address that are taken in and not yet answered.
    """

    batch: int = 16
    queue: int = 64
    megabytes: int = 20
    per_client: int = 32


class StrictResponse(JSONResponse):
    """JSON in which numbers that are not finite are null, as in all that is written here."""

    def render(self, content: Any) -> bytes:
        """Write it."""
        return to_json(content).encode()


class Histogram:
    """Counts values up to each of some bounds, as Prometheus does."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        self.name, self.about, self.bounds = name, about, bounds
        self._counts = [0] * len(bounds)
        self.sum, self.count = 0.0, 0

    def add(self, value: float) -> None:
        """Count a value."""
        for index, bound in enumerate(self.bounds):
            self._counts[index] += value <= bound
        self.sum += value
        self.count += 1

    def text(self) -> str:
        """Write it in Prometheus' format."""
        lines = [f"# HELP {self.name} {self.about}", f"# TYPE {self.name} histogram"]
        lines += [f'{self.name}_bucket{{le="{bound:g}"}} {n}' for bound, n in zip(self.bounds, self._counts, strict=True)]
        lines += [
            f'{self.name}_bucket{{le="+Inf"}} {self.count}',
            f"{self.name}_sum {self.sum:.6f}",
            f"{self.name}_count {self.count}",
        ]
        return "\n".join(lines)


class Service:
    """A model, the images that wait for it, and what is counted.

    Args:
        prepare: From a file's content to the model's input; runs in several threads.
        look: From inputs to the answer for each, for a JSON object; runs in one thread.
        limits: What is taken on.
    """

    def __init__(
        self, prepare: Callable[[bytes], Any], look: Callable[[list[Any]], list[dict[str, Any]]], limits: Limits
    ) -> None:
        self._prepare, self._look, self._limits = prepare, look, limits
        self._readers = ThreadPoolExecutor(torch.get_num_threads(), "reader")
        self._model = ThreadPoolExecutor(1, "model")
        self._waiting: asyncio.Queue[tuple[Any, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()
        self._inside, self._clients = 0, Counter[str]()
        self._answers: Counter[int] = Counter()
        self._seconds = Histogram("gmf_request_seconds", "From the arrival of a request to its answer.", SECONDS)
        self._sizes = Histogram("gmf_batch_images", "Images that the model looked at together.", SIZES)

    def warm_up(self) -> None:
        """Look at a grey image, so that what cannot work fails before anybody waits."""
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "gray").save(buffer, "PNG")
        self._look([self._prepare(buffer.getvalue())])

    async def answer(self, request: Request) -> dict[str, Any]:
        """Take a request in and wait for what the model finds.

        Raises:
            HTTPException: If it is turned away; the detail says why in a line.
        """
        if self._inside >= self._limits.queue:  # before the body is read, so that the memory is bounded too
            raise HTTPException(503, f"{self._inside} requests are waiting already: try again later", {"Retry-After": "1"})
        client = request.client.host if request.client else ""
        if self._clients[client] >= self._limits.per_client:
            waiting = f"{self._clients[client]} requests of {client} are waiting already: try again later"
            raise HTTPException(429, waiting, {"Retry-After": "1"})
        self._inside += 1
        self._clients[client] += 1
        try:
            content = await self._image(request)
            loop = asyncio.get_running_loop()
            found: asyncio.Future[dict[str, Any]] = loop.create_future()
            self._waiting.put_nowait((await loop.run_in_executor(self._readers, self._prepare, content), found))
            return await found
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self._inside -= 1
            self._clients -= Counter([client])  # drops those of whom nothing waits

    async def _image(self, request: Request) -> bytes:
        """Read the image of a request: its body, or the file of a form."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = kind == "multipart/form-data"
        if not (form or kind.startswith("image/") or kind == "application/octet-stream"):
            expected = "expected an image as the body (Content-Type: image/...) or as the file of a multipart form"
            raise HTTPException(415, f"got Content-Type {kind or 'of no kind'}, {expected}")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"the image took over {BODY_SECONDS:g} s to arrive") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client went away") from None
        if not form:
            return body

        async def replay() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async with Request(request.scope, replay).form(max_files=1) as fields:  # raises HTTPException 400 itself
            file = next((value for value in fields.values() if isinstance(value, UploadFile)), None)
            if file is None:
                raise HTTPException(400, "got a form without a file, expected one with an image")
            return await file.read()

    async def _body(self, request: Request) -> bytes:
        most = self._limits.megabytes * 1_000_000
        too_large = HTTPException(413, f"the request is over {self._limits.megabytes} MB")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
        return bytes(body)

    async def _gather(self) -> list[tuple[Any, asyncio.Future[dict[str, Any]]]]:
        """Wait for an image, and for a moment for others if there are requests on their way."""
        batch = [await self._waiting.get()]
        try:
            async with asyncio.timeout(GATHER_SECONDS):
                while len(batch) < min(self._limits.batch, self._inside):
                    batch.append(await self._waiting.get())
        except TimeoutError:
            pass
        return batch

    async def work(self) -> None:
        """Look at what waits, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            try:
                found = await loop.run_in_executor(self._model, self._look, [image for image, _ in batch])
            except Exception as error:  # the next image may be another matter
                for _, future in batch:
                    if not future.done():  # whoever waited may have been cancelled
                        future.set_exception(error)
                continue
            self._sizes.add(len(batch))
            for (_, future), one in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(one)

    def count(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers[status] += 1
        self._seconds.add(seconds)

    def metrics(self) -> str:
        """Write what was counted in Prometheus' format."""
        lines = ["# HELP gmf_requests_total Answers by HTTP status.", "# TYPE gmf_requests_total counter"]
        lines += [f'gmf_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._answers.items())]
        lines += ["# HELP gmf_queue_length Requests that are taken in and not yet answered.", "# TYPE gmf_queue_length gauge"]
        lines += [f"gmf_queue_length {self._inside}", self._seconds.text(), self._sizes.text()]
        return "\n".join(lines) + "\n"


def service(predictor: Any, limits: Limits) -> Service:
    """Return the service of a `groupmixformer.tasks.predictor.Predictor`, which is batched or looks at one image at a time."""
    max_pixels = predictor.max_pixels
    if predictor.batched:
        return Service(
            lambda content: predictor.prepare(decode(content, "image", max_pixels)),
            lambda images: [predictor.answer(found) for found in predictor.predict_prepared(torch.stack(images))],
            limits,
        )
    # Decoded where it is looked at, so that large images do not wait in the memory.
    return Service(
        lambda content: content,
        lambda files: [predictor.answer(predictor.predict(decode(content, "image", max_pixels))) for content in files],
        replace(limits, batch=1),
    )


def application(serving: Service, name: str, task: str) -> FastAPI:
    """Return the routes: POST /predict, GET /health and /metrics.

    Args:
        serving: Gives the answers.
        name: Of the model, for answers.
        task: Of the model.
    """

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(serving.work())
        yield
        worker.cancel()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="gmf serve", lifespan=working, docs_url=None, redoc_url=None)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        start = time.perf_counter()
        try:
            found = await serving.answer(request)
            milliseconds = round(1000 * (time.perf_counter() - start), 2)
            response: JSONResponse = StrictResponse({**found, "model": name, "task": task, "milliseconds": milliseconds})
        except HTTPException as refused:
            response = JSONResponse({"error": refused.detail}, refused.status_code, refused.headers)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            logging.getLogger(__name__).error("gmf serve: the model failed: %s: %s", type(error).__name__, lines[0])
            response = JSONResponse({"error": f"the model failed: {type(error).__name__}"}, 500)
        serving.count(response.status_code, time.perf_counter() - start)
        return response

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"ready": True, "model": name, "task": task}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(serving.metrics(), media_type="text/plain; version=0.0.4")

    return app
