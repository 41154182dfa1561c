"""`vwlmm explore`: a local page on which patches are pointed at."""

import os
import socket
import tempfile
from pathlib import Path

from .errors import Parser
from .shared import load, names_of, port


SUMMARY = "point at patches on a local page, and ask"
EXAMPLE = "vwlmm explore runs/quickstart/joint --images photos"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm explore",
        description="Serve a page to this machine: drop an image, point at a patch and read its visual word beside "
        "what the LLM expected there, see where a word is, ask a question. Nothing leaves the machine.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--compare", metavar="MODEL", nargs="+", default=[], help="other models to show beside it")
    parser.add_argument("--images", metavar="FOLDER", help="images to choose from (default: the model's examples)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=port, default=7860, help="default: 7860")
    arguments = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f'vwlmm explore needs more: pip install "modeling-vwlmm[explore]" ({error})') from error

    from ..hub.card_pictures import EXAMPLES
    from ..looking.explore import Explored, make_app
    from ..looking.search import find_images

    examples = Path(arguments.model) / EXAMPLES
    folder = arguments.images or (str(examples) if examples.is_dir() else None)
    images = find_images(folder) if folder else []
    with (
        socket.create_server((arguments.host, arguments.port)) as listening,
        tempfile.TemporaryDirectory(prefix="vwlmm-") as uploads,
    ):
        os.environ["GRADIO_TEMP_DIR"] = uploads
        models = [Explored(name, *load(name)) for name in (arguments.model, *arguments.compare)]
        app = make_app(models, images, names_of(arguments.host))
        print(f"http://{arguments.host}:{listening.getsockname()[1]} shows it, Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
