"""The routes of a service: POST an image, get JSON. Answers have the request's id and versions, and errors one form."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..files import short, to_json
from .reload import Reloader
from .serve import REQUEST_OPTIONS, Model, Service
from .server import refusal, request_id

VERSION = metadata.version("groupmixformer")
OPEN = ("/health", "/docs", "/openapi.json", "/static-offline-docs/")  # without a key; none tells of images
LOGGER = logging.getLogger(__name__)


class FoundClass(BaseModel):
    """A class of an image."""

    name: str = Field(alias="class")
    index: int
    probability: float


class FoundObject(BaseModel):
    """An object in an image."""

    name: str = Field(alias="class")
    score: float
    box: list[float] = Field(description="left, top, right and bottom in pixels")
    mask: dict[str, Any] | None = Field(None, description="COCO's run lengths, from Mask R-CNN")
    keypoints: dict[str, list[float]] | None = Field(None, description="x, y and height of the heat map, from Keypoint R-CNN")


class Found(BaseModel):
    """What is found in an image; which fields there are depends on the task."""

    classes: list[FoundClass] | None = Field(
        None, description="classification: the likeliest first; several labels: those found"
    )
    probabilities: dict[str, float] | None = Field(None, description="several labels: probability of each")
    objects: list[FoundObject] | None = Field(None, description="detection: the best first")
    shares: dict[str, float] | None = Field(None, description="segmentation: share of the pixels of each class")
    numbers: dict[str, int] | None = Field(None, description="segmentation: number of each class in the mask")
    mask: str | None = Field(None, description="segmentation: PNG in base64")


class About(BaseModel):
    """What answered."""

    model: str
    task: str
    milliseconds: float


class Answer(Found, About):
    """What is found in the image of a request."""


class Answers(About):
    """What is found in the images of a request, in their order."""

    images: list[Found]


class Error(BaseModel):
    """Why a request is not met, in a line."""

    error: str
    request_id: str


_MODEL: dict[str, Any] = {"model": "photos", "task": "classification", "weights": "3f1c0a9be52d7714"}


class ModelHealth(BaseModel):
    """A model that is served."""

    model: str
    task: str
    weights: str = Field(description="the first digits of the SHA-256 of their file")


class Health(ModelHealth):
    """The state of the server, with the model that /predict asks."""

    model_config = ConfigDict(json_schema_extra={"example": {"ready": True, **_MODEL, "version": VERSION, "models": [_MODEL]}})
    ready: bool
    version: str = Field(description="of groupmixformer")
    models: list[ModelHealth] = Field(description="all that /predict/{name} asks")


_ABOUT = {"task": "classification", "milliseconds": 81.4}
_CLASSES = {"classes": [{"class": "ash", "index": 0, "probability": 0.93}, {"class": "elm", "index": 4, "probability": 0.04}]}
EXAMPLES = {
    "classification": {"value": {**_CLASSES, "model": "photos", **_ABOUT}},
    "several labels": {
        "value": {
            **{"classes": [{"class": "cat", "index": 0, "probability": 0.93}], "probabilities": {"cat": 0.93, "dog": 0.08}},
            **{"model": "pets", **_ABOUT},
        }
    },
    "several images": {"value": {"images": [_CLASSES, _CLASSES], "model": "photos", **_ABOUT}},
    "detection": {
        "value": {
            "objects": [{"class": "car", "score": 0.98, "box": [12.0, 30.5, 210.0, 144.0]}],
            **{"model": "street", "task": "detection", "milliseconds": 310.2},
        }
    },
    "segmentation": {
        "value": {
            **{"shares": {"road": 0.7, "sky": 0.3}, "numbers": {"road": 1, "sky": 3}, "mask": "iVBORw0KGgo..."},
            **{"model": "scenes", "task": "segmentation", "milliseconds": 290.1},
        }
    },
}
REFUSED = {
    400: "not a readable image, or another server's Host",
    401: "no API key, or a wrong one",
    404: "no such model",
    408: "the image took too long to arrive",
    413: "the request is too large",
    415: "neither an image nor a form",
    422: "a query parameter that is wrong or unknown",
    429: "too many images of this client are waiting",
    500: "the model failed",
    503: "too many images are waiting",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer | Answers, "content": {"application/json": {"examples": EXAMPLES}}},
    **{status: {"model": Error, "description": about} for status, about in REFUSED.items()},
}
_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": _FILE, "files": {"type": "array", "items": _FILE}}}
BODY = {
    "requestBody": {
        "required": True,
        "description": "An image, or a form: `file` for one image, `files`, repeated, for several.",
        "content": {"multipart/form-data": {"schema": _FORM}, "image/*": {"schema": _FILE}},
    }
}
Top = Annotated[int | None, Query(ge=1, description="classification: classes to name")]
ScoreThreshold = Annotated[
    float | None, Query(gt=0, le=1, description="detection, several labels: least score of what is listed")
]


class StrictResponse(JSONResponse):
    """JSON in which numbers that are not finite are null, as in all that is written here."""

    def render(self, content: Any) -> bytes:
        """Write it."""
        return to_json(content).encode()


def _path(scope: Scope) -> str:
    """Return the path of a request inside of the application, which may be mounted in another."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


class _Answers:
    """ASGI: gives answers ids and versions, counts those about images, and answers what fails unforeseen."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, started, identifier = time.perf_counter(), False, request_id(scope)

        async def note(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"], headers["X-Package-Version"] = identifier, VERSION
                asked = scope["state"].get("model")
                if asked is None and len(self._service.models) == 1:
                    (asked,) = self._service.models.values()
                if asked is not None:
                    headers["X-Model-Version"] = f"{quote(asked.name)}@{asked.weights}".rstrip("@")
                if _path(scope).startswith("/predict"):
                    self._service.count(message["status"], time.perf_counter() - start)
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            if started:
                raise
            LOGGER.error("request %s: %s: %s", identifier, type(error).__name__, short(str(error), 200))
            await refusal(scope, 500, f"the server failed: {type(error).__name__}")(scope, receive, note)


class _Keyed:
    """ASGI: lets requests through that have a key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not (_path(scope).startswith(OPEN) or self._known(Headers(scope=scope))):
            reason = "expected an API key that is known, as the header Authorization: Bearer KEY or X-API-Key: KEY"
            await refusal(scope, 401, reason, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        key = (given.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")).encode("latin-1")
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0  # each is compared, found or not


async def _predict(serving: Service, request: Request, model: Model, options: dict[str, float | None]) -> JSONResponse:
    request.state.model = model
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in request.query_params if name not in model.options]:
        expected = f"expected {' or '.join(model.options)}" if model.options else "expected none"
        name = short(unknown[0])
        raise HTTPException(422, f"{name}: no parameter of {model.name}, a model for {model.task}: {expected}")
    start = time.perf_counter()
    try:
        found = await serving.answer(request, model, tuple(given.items()))
    except HTTPException:
        raise
    except Exception as error:
        about = type(error).__name__, (str(error).splitlines() or [""])[0]
        LOGGER.error("request %s: the model failed: %s: %s", request_id(request.scope), *about)
        return refusal(request.scope, 500, f"the model failed: {type(error).__name__}")
    milliseconds = round(1000 * (time.perf_counter() - start), 2)
    return StrictResponse({**found, "model": model.name, "task": model.task, "milliseconds": milliseconds})


def application(
    serving: Service, keys: Sequence[str] = (), cors_origins: Sequence[str] = (), reloader: Reloader | None = None
) -> FastAPI:
    """Return the routes: POST /predict and /predict/{name}, GET /health, /metrics and /docs.

    Args:
        serving: Gives the answers.
        keys: One of which every request has to bring, but those for `OPEN`; none to let all in.
        cors_origins: Sites whose pages may send requests; ``*`` for any.
        reloader: Puts models in the place of others.
    """

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        jobs = [asyncio.create_task(serving.work())]
        if reloader:
            jobs.append(asyncio.create_task(reloader.watch()))
        yield
        for job in jobs:
            job.cancel()

    # FastAPI's own page of documentation loads scripts from elsewhere.
    secured = [Depends(HTTPBearer(auto_error=False, description="the API key"))] if keys else []
    app = FastAPIOffline(redoc_url=None, title="gmf serve", version=VERSION, lifespan=working, dependencies=secured)
    if keys:
        app.add_middleware(_Keyed, keys=keys)
    if cors_origins:
        told = ["X-Request-ID", "X-Model-Version", "X-Package-Version", "Retry-After"]
        headers = ["Authorization", "X-API-Key", "Content-Type", "X-Request-ID"]
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=headers, expose_headers=told
        )
    app.add_middleware(_Answers, service=serving)  # the last is the outermost

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(request.scope, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(request.scope, 422, f"{first['loc'][-1]}: got {short(str(first['input']))}: {first['msg']}")

    @app.post("/predict", responses=RESPONSES, openapi_extra=BODY, summary="Look at images with the first model")
    async def predict(request: Request, top: Top = None, score_threshold: ScoreThreshold = None) -> JSONResponse:
        first = next(iter(serving.models.values()))
        return await _predict(serving, request, first, dict(zip(REQUEST_OPTIONS, (top, score_threshold), strict=True)))

    @app.post("/predict/{name}", responses=RESPONSES, openapi_extra=BODY, summary="Look at images with the model of a name")
    async def predict_by(
        request: Request,
        name: Annotated[str, Path(json_schema_extra={"enum": [*serving.models]})],  # which /docs offers
        top: Top = None,
        score_threshold: ScoreThreshold = None,
    ) -> JSONResponse:
        if name not in serving.models:
            raise HTTPException(404, f"got model {short(name)}, expected {' or '.join(serving.models)}")
        options = dict(zip(REQUEST_OPTIONS, (top, score_threshold), strict=True))
        return await _predict(serving, request, serving.models[name], options)

    @app.get("/", include_in_schema=False)
    async def start() -> RedirectResponse:
        return RedirectResponse("docs")  # also behind a proxy that puts a path before

    @app.get("/health", responses={200: {"model": Health}}, summary="Whether it is ready, and versions")
    async def health() -> dict[str, Any]:
        models = [{"model": one.name, "task": one.task, "weights": one.weights} for one in serving.models.values()]
        return {"ready": True, **models[0], "version": VERSION, "models": models}

    @app.get("/metrics", summary="For Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(serving.metrics(), media_type="text/plain; version=0.0.4")

    return app
