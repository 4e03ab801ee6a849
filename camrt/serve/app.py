"""The web application: its routes, who may ask, and what it answers when something is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..method_choice import layers_of, parse_method
from ..runtime.cams import METHODS, all_methods
from ..runtime.errors import CamrtError
from ..runtime.explanation import Explanation
from ..tensors import read_tensors, write_tensors
from . import kserve
from .answers import as_json, as_npy
from .errors import Refused
from .guard import Guard, answer_of
from .model import Model
from .service import Service
from .settings import Settings

log = logging.getLogger("camrt.serve")
PICTURES = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}
Format = Literal["json", "png", "npy"]
ERRORS = {
    400: "what was asked does not fit",
    401: "a token is needed",
    403: "a page of another host asked",
    404: "no such model or explanation",
    408: "the request did not arrive in time",
    413: "too large",
    415: "no picture",
    429: "too many wait",
    503: "a model is being opened",
    504: "it took too long",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
EXPLAINED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "image/png": _BINARY, "application/x-npy": _BINARY}}
}
INFERRED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "application/octet-stream": _BINARY}}
}


REQUEST = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}, "application/octet-stream": _BINARY},
    }
}


class Problem(BaseModel):
    """Every error: one line that says what, where and what to do."""

    error: str


def create_app(models: Mapping[str, Model], settings: Settings, page: Path | None = None) -> FastAPI:
    """models: by name. page: a folder of `camrt page`, which is then at /."""
    service = Service(models, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    # the pages of FastAPI's own documentation load scripts from another host
    app = FastAPI(
        title="camrt",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={status: {"model": Problem, "description": text} for status, text in ERRORS.items()},
    )
    app.openapi = partial(_openapi, app, list(models))
    _add_errors(app)
    _add_health(app, service)
    _add_explain(app, service)
    _add_kserve(app, service)
    if page is not None:
        app.mount("/", StaticFiles(directory=page, html=True))
    app.add_middleware(Guard, service=service)
    if settings.origins:  # around the guard, so that a browser also reads what the guard refuses
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _openapi(app: FastAPI, models: list[str]) -> dict[str, Any]:
    """What FastAPI generates, with the names of the models."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in schema["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", []):
                    if parameter["name"] == "name":
                        parameter["schema"]["enum"] = models
        app.openapi_schema = schema
    return app.openapi_schema


def _add_errors(app: FastAPI) -> None:
    """Every error is {"error": one line}."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return answer_of(error)

    @app.exception_handler(CamrtError)
    async def wrong(_: Request, error: CamrtError) -> JSONResponse:
        return answer_of(Refused(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer_of(Refused(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("%s", json.dumps({"error": type(error).__name__}), exc_info=error)
        return answer_of(Refused(500, "the server failed: its log says why"))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """The server runs."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> dict[str, Any]:
        """Every model is open. 503 until then."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_explain(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names of the models, and which of them are open."""
        return {"models": [{"name": name, "ready": model.is_ready} for name, model in service.models.items()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """What a model takes, its classes, layers and methods."""
        found = service.model(name)
        manifest = found.explainer.manifest
        all_methods()
        return {
            "name": name,
            "input_shape": list(manifest.input_shape),
            "classes": list(manifest.classes or ()),
            "num_classes": manifest.num_classes,
            "layers": [t.name for t in manifest.taps],
            "methods": list(METHODS),
            "takes_pictures": manifest.preprocess is not None,
        }

    @app.post("/v1/models/{name}/explain", openapi_extra=PICTURES, response_model=None, responses=EXPLAINED)
    async def explain(
        request: Request,
        name: str,
        method: Annotated[str, Query(description="NAME or NAME:option=value,...")] = "winsor_cam",
        target: Annotated[list[str] | None, Query(description="a class, or one for each picture")] = None,
        percentile: Annotated[float | None, Query(description="of winsor_cam")] = None,
        layers: Annotated[list[str] | None, Query(description="conv, last or names")] = None,
        format: Format = "json",
        map: Annotated[bool, Query(description="whether JSON holds the maps")] = True,
        keep: Annotated[bool, Query(description="whether the explanation can be retuned by its id")] = False,
        opacity: float = 0.5,
        colormap: str = "turbo",
    ) -> Response:
        """Explains pictures: the body is one picture, or a form with one or several fields `image`."""
        found = service.model(name)
        _ = found.explainer  # 503 while it is opened, before the body is read
        pictures = await _pictures(request)
        choice = parse_method(method)
        options = dict(choice.options) | ({} if percentile is None else {"percentile": percentile})
        targets = _one_each(target, len(pictures))
        own = [options] * len(pictures)
        explained = await service.explain(found, pictures, choice.name, own, layers_of(layers), targets)
        keys = [service.keeper.keep(name, e, p) if keep else None for e, p in zip(explained, pictures, strict=True)]
        drawing = {"opacity": opacity, "colormap": colormap}
        return await _response(service, found, explained, pictures, keys, format, map, drawing)

    @app.post("/v1/explanations/{key}/retune", response_model=None, responses=EXPLAINED)
    async def retune(
        key: str,
        percentile: float,
        format: Format = "json",
        map: bool = True,
        opacity: float = 0.5,
        colormap: str = "turbo",
    ) -> Response:
        """The kept explanation at another percentile, without a run of the network."""
        kept = service.keeper.get(key)
        again = await service.aside(lambda: kept.explanation.retune(percentile=percentile))
        drawing = {"opacity": opacity, "colormap": colormap}
        found = service.model(kept.model)
        return await _response(service, found, [again], [kept.source], [key], format, map, drawing)


async def _pictures(request: Request) -> list[bytes]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1000, max_fields=10) as form:
            files = form.getlist("image")
            pictures = [await f.read() if not isinstance(f, str) else f.encode() for f in files]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        pictures = [await request.body()]
    else:
        raise Refused(415, f"content type {kind!r}: send a picture (image/png, ...), or a form with fields `image`")
    if not pictures or not all(pictures):
        raise Refused(400, "no picture was sent: the body, or the form's field `image`, is empty")
    return pictures


def _one_each(targets: list[str] | None, images: int) -> list[str | None]:
    if not targets:
        return [None] * images
    if len(targets) not in (1, images):
        raise Refused(400, f"{len(targets)} targets for {images} pictures: pass one, or one for each")
    return [targets[0]] * images if len(targets) == 1 else list(targets)


async def _response(
    service: Service,
    model: Model,
    explained: Sequence[Explanation],
    sources: Sequence[bytes | None],
    keys: Sequence[str | None],
    format: str,
    maps: bool,
    drawing: dict[str, Any],
) -> Response:
    with service.stage(model.name, "answer"):
        if format == "npy":
            return Response(await service.aside(as_npy, explained), media_type="application/x-npy")
        if format == "png":
            if len(explained) != 1:
                raise Refused(400, f"format png is for one picture, and {len(explained)} were sent: use json or npy")

            def draw() -> bytes:
                return model.with_photo(explained[0], sources[0]).png(0, **drawing)

            return Response(await service.aside(draw), media_type="image/png")
        return JSONResponse(await service.aside(as_json, explained, keys, maps))


def _add_kserve(app: FastAPI, service: Service) -> None:
    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "camrt", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        service.check_ready()
        return {"ready": True}

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/1/ready", include_in_schema=False)
    async def model_ready(name: str) -> dict[str, Any]:
        _ = service.model(name).explainer
        return {"name": name, "ready": True}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/1", include_in_schema=False)
    async def model_metadata(name: str) -> dict[str, Any]:
        manifest = service.model(name).explainer.manifest
        return kserve.metadata(name, manifest.input_shape, manifest.num_classes)

    @app.post("/v2/models/{name}/infer", response_model=None, responses=INFERRED, openapi_extra=REQUEST)
    @app.post("/v2/models/{name}/versions/1/infer", include_in_schema=False, response_model=None)
    async def infer(request: Request, name: str) -> Response:
        """Inputs: image (B, C, H, W) FP32, or picture (B,) BYTES; perhaps target (B,) INT64 and percentile (B,) FP32.
        Parameters: method, percentile, layers.
        """
        found = service.model(name)
        _ = found.explainer
        body, header = await request.body(), request.headers.get(kserve.HEADER)
        short = header is not None and len(header) < 5  # else the text takes long to read
        most = service.settings.images
        if short:
            inputs, asked = kserve.read_request(body, header, most)
        else:
            inputs, asked = await service.aside(kserve.read_request, body, header, most)
        read = read_tensors(inputs, asked.get("parameters") or {})
        explained = await service.explain(found, read.images, read.method, read.options, read.layers, read.targets)
        outputs = write_tensors(explained)
        if not short:
            answer, headers = await service.aside(kserve.write_response, name, outputs, asked)
        else:
            answer, headers = kserve.write_response(name, outputs, asked)
        return Response(answer, headers=headers)
