"""A page of this machine on which patches are pointed at, and questions asked."""

import base64
import functools
import html
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from PIL import Image, UnidentifiedImageError
from transformers import LlavaProcessor

from ..data.images import FORMATS, open_images
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import patch_grid, question_about
from ..words import seen_image
from .heatmaps import word_probabilities
from .patches import read_patches


if TYPE_CHECKING:
    from fastapi import FastAPI

WORDS = 10  # of a patch
LONGEST_ANSWER = 128  # tokens
LARGEST_UPLOAD = "64mb"
HERE = Path(__file__).parent
# A browser loads and sends nothing elsewhere, whatever Gradio's pages ask for; its scripts compile templates
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'"
)


class Explored(NamedTuple):
    """A model of the page, with the name that stands above what it says."""

    name: str
    model: VWLmmForCausalLM
    processor: LlavaProcessor


def view_of(explored: Explored, image: Image.Image) -> dict[str, Any]:
    """What the page shows of a model's reading of an image, in JSON's types."""
    patches = read_patches(explored.model, explored.processor, image, WORDS)
    rows, columns = patch_grid(explored.processor, len(patches))
    png = io.BytesIO()
    seen_image(explored.processor, image).save(png, "PNG")
    return {
        "image": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
        "rows": rows,
        "columns": columns,
        "patches": [{"words": words, "expected": expected, "kl": kl} for words, expected, kl in patches],
        "heat": None,
    }


def answer(explored: Explored, image: Image.Image, question: str) -> str:
    """What a model says to a question about an image, the most probable token each time."""
    processor, model = explored.processor, cast(Any, explored.model)
    inputs = question_about(processor, [image], question).to(model.device, model.dtype)
    with torch.no_grad():
        generated = model.generate(
            **inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, temperature=None, top_p=None, top_k=None
        )
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def open_upload(path: str | os.PathLike) -> Image.Image:
    """The image in a file; `ValueError` with a sentence for people who know the file by its name alone."""
    try:
        (image,) = open_images({"images": [{"path": Path(path).name, "bytes": Path(path).read_bytes()}]})
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise ValueError(f"{Path(path).name} is no image, expected {', '.join(FORMATS)}") from error
        raise
    return image


def make_app(models: Sequence[Explored], images: Sequence[str], hosts: Sequence[str]) -> "FastAPI":
    """The page as an application of ASGI.

    Args:
        models: one, or several to compare.
        images: files to choose from.
        hosts: names of this server; a page of another name that leads here is refused.

    Raises:
        ValueError: the patches of a model are no grid.
        ImportError: gradio is missing.
    """
    import gradio
    from fastapi import FastAPI
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    for explored in models:
        patch_grid(explored.processor, explored.model.config.image_seq_length)
    app, page = FastAPI(openapi_url=None), _page(models, images)
    page.has_launched = True  # or Gradio takes any file of this machine for an upload
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=LARGEST_UPLOAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"),
        css=(HERE / "explore.css").read_text(encoding="utf-8"),
    )
    app.add_middleware(_Policy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


class _Policy:
    """Refuses what pages of other servers ask for, and adds `POLICY` to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi.responses import PlainTextResponse

        headers = dict(scope.get("headers", []))
        origin = headers.get(b"origin")
        # A browser sends an upload of any page here, though the page reads no answer
        if scope["type"] == "http" and origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            await PlainTextResponse("a page of another server asks", 403)(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _page(models: Sequence[Explored], images: Sequence[str]) -> Any:
    import gradio

    def told(function: Callable) -> Callable:
        """What is wrong with the input, as a sentence on the page."""

        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (ValueError, OSError) as error:
                gradio.Warning(html.escape(str(error)), title="That did not work")
                return gradio.skip()

        return wrapped

    @told
    def show(path: str | None) -> dict[Any, Any]:
        if not path:
            return dict.fromkeys([current, *views, *answers])
        image = open_upload(path)
        said = [view_of(explored, image) for explored in models]
        return {current: (path, said), **dict(zip(views, said, strict=True)), **dict.fromkeys(answers, "")}

    @told
    def heat(shown: Any, word: str) -> dict[Any, Any]:
        path, said = of_image(shown)
        if not word.strip():
            return dict(zip(views, said, strict=True))
        image, heats = open_upload(path), []
        for _, model, processor in models:
            values = word_probabilities(model, processor, [image], [word])[0, 0].tolist()
            heats.append({"word": word.strip(), "values": values})
        return {view: own | {"heat": heat} for view, own, heat in zip(views, said, heats, strict=True)}

    @told
    def ask(shown: Any, question: str) -> dict[Any, Any]:
        path, _ = of_image(shown)
        if not question.strip():
            raise ValueError("there is no question, expected some words")
        image = open_upload(path)
        return {place: answer(explored, image, question) for place, explored in zip(answers, models, strict=True)}

    def of_image(shown: Any) -> Any:
        if shown is None:
            raise ValueError("there is no image yet, drop or choose one")
        return shown

    names = {Path(path).name: path for path in images}
    if len(names) < len(images):  # of several folders
        names = {str(path): path for path in images}
    # One event at a time: each takes all of the processor
    together: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
    with gradio.Blocks(title="Visual words", analytics_enabled=False) as page:
        # The image's file, and each model's view of it. An open image would stay in memory with every page
        current = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=240):
                upload = gradio.File(label="Drop an image here", elem_id="upload", height=140)
                choice = gradio.Dropdown(
                    list(names.items()),
                    value=next(iter(names.values()), None),
                    label="or choose one",
                    elem_id="choice",
                    visible=bool(names),
                )
                word = gradio.Textbox(label="Where is this word?", placeholder="a word, then Enter", elem_id="word")
                question = gradio.Textbox(
                    label="Ask about the image", placeholder="a question, then Enter", elem_id="question"
                )
            with gradio.Column(scale=4):
                views, answers = [], []
                with gradio.Row():
                    for i, explored in enumerate(models):
                        with gradio.Column():
                            gradio.HTML(f"<b>{html.escape(explored.name)}</b>")
                            views.append(
                                gradio.HTML(
                                    None,
                                    html_template='<div class="vw-view"></div>',
                                    js_on_load=(HERE / "explore.js").read_text(encoding="utf-8"),
                                    elem_id=f"view-{i}",
                                )
                            )
                            answers.append(gradio.Textbox(label="Answer", interactive=False, elem_id=f"answer-{i}"))
        shown = [current, *views, *answers]
        upload.upload(show, upload, shown, **together).then(lambda: (None, None), None, [upload, choice])
        choice.input(show, choice, shown, **together)
        page.load(show, choice, shown, **together)
        word.submit(heat, [current, word], views, **together)
        question.submit(ask, [current, question], answers, **together)
    return page
