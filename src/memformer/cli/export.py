"""The `memformer export` command."""

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser

from memformer.cli.parsing import add_model_arguments, new_parser, parse
from memformer.errors import InputError
from memformer.models import load_model
from memformer.models.hugging_face import find_model_folder
from memformer.training.run_folder import find_weights
from memformer.utils.progress import print_warning

EXPORT_HELP = """Write a trained model as a folder that Hugging Face transformers reads, or as ONNX graphs.

--hf: the folder holds config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
README.md. It appears complete or not at all. The commands of memformer and Memformer.from_pretrained read it too.
A model without a text tokenizer (images, arrays of token ids) is exported without one. Needs the extra:
pip install 'memformer-lm[hf]'.

--onnx: the folder holds timestep.onnx, which reads a segment into the memory, for a Memformer decoding_step.onnx, which
predicts one token, and sizes.json, for programs without PyTorch. Needs the extra: pip install 'memformer-lm[onnx]'.

  memformer export runs/demo --hf exported/demo
  memformer export runs/demo --onnx exported/graphs
  memformer export runs/demo --hf exported/demo --license mit --push someone/demo
"""


def export_parser() -> ArgumentParser:
    """Return the parser of `memformer export`."""
    parser = new_parser("export", EXPORT_HELP, "RUN --hf FOLDER|--onnx FOLDER [options]")
    add_model_arguments(parser)
    parser.add_argument("--hf", type=str, default=None, help="New or empty folder to write for transformers.")
    parser.add_argument("--onnx", type=str, default=None, help="New or empty folder to write ONNX graphs to.")
    parser.add_argument(
        "--push",
        type=str,
        default=None,
        help="Also upload the folder to the Hugging Face hub, as the model OWNER/NAME.",
    )
    parser.add_argument(
        "--license", type=str, default=None, help="License in the model card, as the hub names it: apache-2.0, mit, ..."
    )
    parser.add_argument(
        "--auto_map",
        action="store_true",
        help="Also write code that transformers loads with trust_remote_code=True, so that users need not import "
        "memformer.hf. They still need the package.",
    )
    return parser


def run_export(argv: list[str]) -> None:
    """Write a trained model as a folder of Hugging Face transformers, and upload it if asked to, or as ONNX graphs.

    Raises:
        InputError: The run or an option is invalid, a package is missing, or the upload failed.
    """
    options = parse(export_parser(), argv)
    if (options.hf is None) == (options.onnx is None):
        raise InputError("give either --hf or --onnx: the folder to write")
    if options.onnx is not None:
        _export_onnx(options)
    else:
        _export_hf(options)


def _export_onnx(options: Any) -> None:
    given = [name for name in ("push", "license", "auto_map") if getattr(options, name)]
    if given:
        raise InputError(f"--{given[0]} belongs to --hf; it says nothing about ONNX graphs")
    from memformer.generation.onnx_export import export_onnx  # slow to import

    weights, _ = find_weights(find_model_folder(options.run), which=options.checkpoint, warn=print_warning)
    model = load_model(weights, num_slots=options.num_slots)
    folder = export_onnx(model, options.onnx, progress=lambda graph: print(f"exporting {graph}", file=sys.stderr))
    files = sorted(file.name for file in folder.iterdir())
    print(json.dumps({"folder": str(folder), "files": files}) if options.json else folder)


def _export_hf(options: Any) -> None:
    from memformer.hf.export import check_hub_name, export, push, read_export_source  # slow to import

    if options.push is not None:
        check_hub_name(options.push)
    source = read_export_source(options.run, which=options.checkpoint, num_slots=options.num_slots)
    if source.no_tokenizer is not None:
        print_warning(f"exported without a tokenizer: {source.no_tokenizer}")
    folder = export(source, options.hf, hub_name=options.push, license_name=options.license, auto_map=options.auto_map)
    address = None if options.push is None else push(folder, options.push)
    if options.json:
        print(json.dumps({"folder": str(folder), "has_tokenizer": source.tokenizer is not None, "address": address}))
    else:
        print(folder if address is None else f"{folder}\n{address}")
