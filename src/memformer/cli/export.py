"""The `memformer export` command."""

import json

from jsonargparse import ArgumentParser

from memformer.cli.parsing import add_model_arguments, new_parser, parse
from memformer.errors import InputError
from memformer.utils.progress import print_warning

EXPORT_HELP = """Write a trained model as a folder that Hugging Face transformers reads, with a model card.

The folder holds config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
README.md. It appears complete or not at all. The commands of memformer and Memformer.from_pretrained read it too.
A model without a text tokenizer (images, arrays of token ids) is exported without one. Needs the extra:
pip install 'memformer-lm[hf]'.

  memformer export runs/demo --hf exported/demo
  memformer export runs/demo --hf exported/demo --license mit --push someone/demo
"""


def export_parser() -> ArgumentParser:
    """Return the parser of `memformer export`."""
    parser = new_parser("export", EXPORT_HELP, "RUN --hf FOLDER [--push OWNER/NAME] [options]")
    add_model_arguments(parser)
    parser.add_argument("--hf", type=str, default=None, help="New or empty folder to write.")
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
    """Write a trained model as a folder of Hugging Face transformers, and upload it if asked to.

    Raises:
        InputError: The run or an option is invalid, transformers is missing, or the upload failed.
    """
    options = parse(export_parser(), argv)
    if options.hf is None:
        raise InputError("--hf is missing: the folder to write")
    from memformer.hf.export import check_hub_name, export, open_source, push  # slow to import

    if options.push is not None:
        check_hub_name(options.push)
    source = open_source(options.run, which=options.checkpoint, num_slots=options.num_slots)
    if source.no_tokenizer is not None:
        print_warning(f"exported without a tokenizer: {source.no_tokenizer}")
    folder = export(source, options.hf, hub_name=options.push, license_name=options.license, auto_map=options.auto_map)
    address = None if options.push is None else push(folder, options.push)
    if options.json:
        print(json.dumps({"folder": str(folder), "has_tokenizer": source.tokenizer is not None, "address": address}))
    else:
        print(folder if address is None else f"{folder}\n{address}")
