"""`vwlmm export`: writes a model as other runtimes read it."""

from .errors import Parser
from .shared import quiet


SUMMARY = "write a model as other runtimes read it"
EXAMPLE = "vwlmm export vw-lmm-vicuna-7b llava --to llava"
FORMATS = {
    "llava": "the LLaVA of transformers, without the VM head",
    "gguf": "two files for llama.cpp, which take its --converter",
    "onnx": "graphs of the image encoder, the visual words, the embeddings and the LLM",
    "openvino": "the same graphs for OpenVINO",
    "remote-code": "the model with the code that computes it, for transformers without this package",
}


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm export",
        description="Write a VW-LMM model as other runtimes read it: "
        + "; ".join(f"{name}, {what}" for name, what in FORMATS.items())
        + ".",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or, but for remote-code, repository of the model")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--to", choices=[*FORMATS], required=True, help="what to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights that are written (default: theirs)"
    )
    parser.add_argument("--converter", help="for gguf: the convert_hf_to_gguf.py of a checkout of llama.cpp")
    arguments = parser.parse_args(argv)
    if arguments.to == "remote-code" and arguments.dtype:
        parser.error("--dtype is not for remote-code, which copies the weights as they are")
    if (arguments.to == "gguf") != (arguments.converter is not None):
        parser.error("--to gguf takes llama.cpp's own converter, --converter llama.cpp/convert_hf_to_gguf.py")

    import torch

    from ..conversion.llama_cpp import convert_to_gguf
    from ..conversion.llava import convert_to_llava
    from ..hub.repository import export_with_code

    quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.to == "llava":
        convert_to_llava(arguments.model, arguments.destination, dtype=dtype)
    elif arguments.to == "gguf":
        convert_to_gguf(arguments.model, arguments.destination, arguments.converter, dtype=dtype)
    elif arguments.to == "remote-code":
        export_with_code(arguments.model, arguments.destination)
    else:
        from ..conversion.graphs import export_graphs

        export_graphs(arguments.model, arguments.destination, arguments.to, dtype=dtype)
