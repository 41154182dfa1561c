"""`vwlmm serve`: an OpenAI-style server of a model."""

import base64
import binascii
import io
import json
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import describe
from .errors import Parser
from .shared import load, names_of, port


if TYPE_CHECKING:
    from fastapi import FastAPI

SUMMARY = "answer requests of OpenAI's chat API"
EXAMPLE = "vwlmm serve runs/quickstart/joint --port 8000"
LARGEST_REQUEST = 64 * 2**20  # bytes


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm serve",
        description="Answer requests of OpenAI's chat API, /v1/chat/completions, with what transformers has for it. "
        "Images come with a request, as data: URLs, or lie in --image-folder.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository; requests know it by the last part of its name")
    parser.add_argument("--adapter", help="folder or repository of an adapter of the model")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=port, default=8000, help="default: 8000")
    parser.add_argument("--image-folder", type=Path, help="let requests name the files below it, as file:PATH")
    arguments = parser.parse_args(argv)
    if arguments.image_folder is not None and not arguments.image_folder.is_dir():
        raise FileNotFoundError(f"{arguments.image_folder}: no such image folder")
    try:
        import uvicorn
        from transformers.cli.serving.chat_completion import ChatCompletionHandler  # noqa: F401
    except ImportError as error:
        raise ImportError(f'vwlmm serve needs more: pip install "modeling-vwlmm[serve]" ({error})') from error

    model, processor = load(arguments.model, arguments.adapter)
    name = Path(arguments.model).resolve().name
    app = make_app(model, processor, name, names_of(arguments.host), arguments.image_folder)
    with socket.create_server((arguments.host, arguments.port)) as listening:
        address = f"http://{arguments.host}:{listening.getsockname()[1]}/v1"
        print(f'"{name}" answers at {address}, Ctrl-C ends it', flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def make_app(
    model: Any, processor: Any, name: str, hosts: Sequence[str], image_folder: Path | None = None
) -> "FastAPI":
    """The server's application: transformers' chat completions, of one model, for requests that were looked at.

    Requests name one of `hosts` as their `Host`, or get status 400.
    """
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.middleware.trustedhost import TrustedHostMiddleware
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState, Modality

    class OneModel(ModelManager):
        """Hands out one model that is loaded already, whatever its name in transformers' tables."""

        def load_model_and_processor(self, *args, **kwargs):
            return model, processor

        def get_model_modality(self, *args, **kwargs):
            return Modality.VLM

    manager = OneModel()
    manager.force_model = name
    handler = ChatCompletionHandler(manager, GenerationState())
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    def refuse(message: str, status: int = 400) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        if int(request.headers.get("content-length") or LARGEST_REQUEST + 1) > LARGEST_REQUEST:
            return refuse(f"a request says its length, of at most {LARGEST_REQUEST} bytes", 413)
        try:
            body = await run_in_threadpool(checked_request, await request.body(), image_folder)
            return await handler.handle_request(body, str(uuid.uuid4()))
        except HTTPException as error:
            return refuse(error.detail, error.status_code)
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            return refuse(str(error))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": ""}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def checked_request(content: bytes, image_folder: Path | None = None) -> dict[str, Any]:
    """A request of the chat API whose images were opened and are part of it.

    Args:
        content: its JSON.
        image_folder: where `file:` URLs lead; they are refused if not given.

    Raises:
        ValueError: it is none, or an image is not to be had.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from error
    messages = body.get("messages") if isinstance(body, dict) else None
    if isinstance(body, dict) and "chat_template" in (body.get("chat_template_kwargs") or {}):
        raise ValueError("chat_template_kwargs: found a chat_template, expected variables of the model's own")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: found {describe(messages)}, expected a list of messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: found {describe(message)}, expected a role and a content")
        parts = message.get("content")
        if parts is not None and not isinstance(parts, (str, list)):
            raise ValueError(f"{where}.content: found {describe(parts)}, expected a text or a list of parts")
        for j, part in enumerate(parts if isinstance(parts, list) else []):
            _check_part(part, f"{where}.content[{j}]", image_folder)
    return body


def _check_part(part: Any, where: str, image_folder: Path | None) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise ValueError(
            f'{where}: found {describe(part)}, expected {{"type": "text", "text": ...}} or '
            '{"type": "image_url", "image_url": {"url": ...}}'
        )
    part["image_url"] = {"url": _as_data(url, where, image_folder)}


def _as_data(url: str, where: str, image_folder: Path | None) -> str:
    """The image of a URL as a data: URL of a PNG."""
    from ..data.images import open_images

    scheme, _, rest = url.partition(":")
    image: dict[str, Any] = {"path": None, "bytes": None}
    if scheme == "data" and ";base64," in rest:
        try:
            image["bytes"] = base64.b64decode(rest.partition(";base64,")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{where}: the data: URL is not base64: {error}") from error
    elif scheme == "file" and image_folder is not None:
        path = (image_folder / rest.removeprefix("//").lstrip("/")).resolve()
        if not path.is_relative_to(image_folder.resolve()) or not path.is_file():
            raise ValueError(f"{where}: {describe(url)} is no file of the image folder")
        image["bytes"] = path.read_bytes()
    else:
        files = "" if image_folder is None else ", or file:NAME of the image folder"
        raise ValueError(f"{where}: found the URL {describe(url)}, expected data:image/...;base64,...{files}")
    try:
        (opened,) = open_images({"images": [image]})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    png = io.BytesIO()
    opened.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
