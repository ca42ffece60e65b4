"""Models and the images that wait for them: what is behind `groupmixformer.deploy.routes`.

Images that arrive together are looked at together. LitServe (0.2.19) does that too, but the queue to its workers has no
bound, they are processes that it terminates with what still waits for them, and it exports no metrics. What is left to write is
short: requests wait in one event loop, and one thread runs the models.
"""

import asyncio
import functools
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ..data.channels import AnyImage, to_npy

BODY_SECONDS = 30.0  # to send an image in
GATHER_SECONDS = 0.005  # that an image waits for others which are on their way
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
REQUEST_OPTIONS = ("top", "score_threshold")  # of predictors
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        batch: Images that the model looks at together.
        queue: Images that are taken in and not yet answered; more are turned away.
        megabytes: Size of a request's body.
        per_client: Images of one address that are taken in and not yet answered.
    """

    batch: int = 16
    queue: int = 64
    megabytes: int = 20
    per_client: int = 32


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


Options = tuple[tuple[str, float], ...]  # of the task, by name, that a request sets for itself


@dataclass(frozen=True)
class Model:
    """What a service looks at images with; one that takes its place is another object, so no request sees half of it.

    Attributes:
        name: By which it is asked for.
        task: Of the model.
        prepare: From a file's content to the model's input; runs in several threads.
        look: From inputs, and options by name, to the answer for each, for a JSON object; runs in one thread.
        batched: Whether it gains from several inputs at a time.
        options: Names of those that a request may set.
        weights: Says which they are, such as a checksum.
        fused: Whether it is in its inference form.
        blank: An image to try it on; grey by default.
    """

    name: str
    task: str
    prepare: Callable[[bytes], Any]
    look: Callable[..., list[dict[str, Any]]]
    batched: bool = True
    options: tuple[str, ...] = ()
    weights: str = ""
    fused: bool = False
    blank: bytes = b""

    def warm_up(self) -> None:
        """Look at a grey image, so that what cannot work fails before anybody waits."""
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "gray").save(buffer, "PNG")
        self.look([self.prepare(self.blank or buffer.getvalue())])


@dataclass(frozen=True)
class _Waiting:
    """An image that waits, with what it waits for."""

    model: Model
    options: Options
    image: Any
    found: asyncio.Future[dict[str, Any]]


class Service:
    """Models, the images that wait for them, and what is counted.

    Args:
        models: Each of another name; they take turns in one thread.
        limits: What is taken on, of all together.

    Attributes:
        models: By name; the first is the one that requests mean which name none.

    Raises:
        ValueError: If two have one name.
    """

    def __init__(self, models: Sequence[Model], limits: Limits) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise ValueError(f"got models named {', '.join(m.name for m in models)}, expected a name of its own for each")
        # Without batches none waits for others, and a result leaves as soon as it is there.
        self._limits = limits if any(model.batched for model in models) else replace(limits, batch=1)
        self._readers = ThreadPoolExecutor(torch.get_num_threads(), "reader")
        self._model = ThreadPoolExecutor(1, "model")
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._inside, self._clients = 0, Counter[str]()
        self._answers: Counter[int] = Counter()
        self._seconds = Histogram("gmf_request_seconds", "From the arrival of a request to its answer.", SECONDS)
        self._sizes = Histogram("gmf_batch_images", "Images that the model looked at together.", SIZES)

    @contextmanager
    def _places(self, images: int, client: str) -> Iterator[None]:
        """Take so many images of a client in, or turn it away."""
        if self._inside + images > self._limits.queue:
            raise HTTPException(503, f"{self._inside} images are waiting already: try again later", {"Retry-After": "1"})
        if self._clients[client] + images > self._limits.per_client:
            waiting = f"{self._clients[client]} images of {client} are waiting already: try again later"
            raise HTTPException(429, waiting, {"Retry-After": "1"})
        taken = Counter({client: images})
        self._inside += images
        self._clients += taken
        try:
            yield
        finally:
            self._inside -= images
            self._clients -= taken  # drops those of whom nothing waits

    async def answer(self, request: Request, model: Model, options: Options = ()) -> dict[str, Any]:
        """Take a request in and wait for what a model finds.

        Returns:
            For one image what was found in it; for several, ``images`` with that of each, in their order.

        Raises:
            HTTPException: If it is turned away; the detail says why in a line.
        """
        client = request.client.host if request.client else ""
        with self._places(1, client):  # before the body is read, so that the memory is bounded too
            images, several = await self._images(request)
            with self._places(len(images) - 1, client):
                looks = (self._look(image, model, options) for image in images)
                found = await asyncio.gather(*looks, return_exceptions=True)  # or some would go on without a place
        for number, one in enumerate(found, 1):
            if isinstance(one, ValueError):
                which = f"image {number} of {len(found)}: {str(one).removeprefix('image: ')}" if several else str(one)
                raise HTTPException(400, which) from one
            if isinstance(one, BaseException):
                raise one
        results = cast("list[dict[str, Any]]", found)
        return {"images": results} if several else results[0]

    async def _look(self, content: bytes, model: Model, options: Options) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[dict[str, Any]] = loop.create_future()
        image = await loop.run_in_executor(self._readers, model.prepare, content)
        self._waiting.put_nowait(_Waiting(model, options, image, found))
        return await found

    async def _images(self, request: Request) -> tuple[list[bytes], bool]:
        """Read the images of a request, its body or the files of a form, and whether it asks for several answers."""
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
            return [body], False

        async def replay() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        most = min(self._limits.queue, self._limits.per_client)  # more would never find room
        async with Request(request.scope, replay).form(max_files=most) as fields:  # raises HTTPException 400 itself
            files = [(name, value) for name, value in fields.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise HTTPException(400, "got a form without a file, expected one with an image")
            several = len(files) > 1 or files[0][0] == "files"
            return [await file.read() for _, file in files], several

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

    async def _gather(self) -> list[_Waiting]:
        """Wait for an image, and for a moment for others if there are some on their way."""
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
        while True:
            together: dict[Any, list[_Waiting]] = defaultdict(list)
            for one in await self._gather():
                together[(one.model, one.options) if one.model.batched else one.found].append(one)
            for batch in together.values():
                await self._look_together(batch)

    async def _look_together(self, batch: list[_Waiting]) -> None:
        look = functools.partial(batch[0].model.look, [one.image for one in batch], **dict(batch[0].options))
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._model, look)
        except Exception as error:  # the next image may be another matter
            for one in batch:
                if not one.found.done():  # whoever waited may have been cancelled
                    one.found.set_exception(error)
            return
        self._sizes.add(len(batch))
        for one, answer in zip(batch, found, strict=True):
            if not one.found.done():
                one.found.set_result(answer)

    def count(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers[status] += 1
        self._seconds.add(seconds)

    def metrics(self) -> str:
        """Write what was counted in Prometheus' format."""
        lines = ["# HELP gmf_requests_total Answers by HTTP status.", "# TYPE gmf_requests_total counter"]
        lines += [f'gmf_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._answers.items())]
        lines += ["# HELP gmf_queue_length Images that are taken in and not yet answered.", "# TYPE gmf_queue_length gauge"]
        lines += [f"gmf_queue_length {self._inside}", self._seconds.text(), self._sizes.text()]
        return "\n".join(lines) + "\n"


def served(predictor: Any, name: str, task: str, weights: str = "") -> Model:
    """Return what a service needs of a `groupmixformer.tasks.predictor.Predictor`.

    Args:
        predictor: Ready to look at images; one that is not batched looks at one at a time.
        name: By which it is asked for.
        task: Of the model.
        weights: Says which they are, such as a checksum.
    """

    def read(content: bytes) -> AnyImage:
        image: AnyImage = predictor.channels.decode(content, "image", predictor.max_pixels)
        return image

    if predictor.batched:

        def prepare(content: bytes) -> Any:
            return predictor.prepare(read(content))

        def look(images: list[Any], **options: Any) -> list[dict[str, Any]]:
            asked = predictor.with_options(**options)
            return [asked.answer(found) for found in asked.predict_prepared(torch.stack(images))]

    else:  # decoded where it is looked at, so that large images do not wait in the memory

        def prepare(content: bytes) -> Any:
            return content

        def look(images: list[Any], **options: Any) -> list[dict[str, Any]]:
            asked = predictor.with_options(**options)
            return [asked.answer(asked.predict(read(content))) for content in images]

    blank = b"" if predictor.channels.count == 3 else to_npy(predictor.channels.blank())
    options = tuple(option for option in REQUEST_OPTIONS if option in predictor.options)
    return Model(name, task, prepare, look, predictor.batched, options, weights, predictor.fused, blank)
