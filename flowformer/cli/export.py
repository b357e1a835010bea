"""``flowformer export``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.parser import Parser, usable
from flowformer.cli.arguments.trained import open_run, require, run_arguments
from flowformer.cli.output.paths import check_folder, output_path


def main(words: Sequence[str]) -> int:
    """Export the model of a run to other libraries."""
    parser = Parser(prog="flowformer export", description=main.__doc__)
    run_arguments(parser)
    parser.add_argument("--to", choices=["hf"], required=True, help="hf: a folder for Hugging Face's from_pretrained")
    parser.add_argument(
        "--out", type=output_path, metavar="DIR", help="folder to write (default: RUN/hf)", default=None
    )
    values = parser.parse(words)
    folder = values.out or values.run / "hf"
    check_folder(folder)
    _, model, form = open_run(values.run, values.checkpoint)
    require(values.run, form, "export")

    from flowformer.interop.hf.export import save_run

    usable(save_run, model, form.tokenizer, folder)
    print(f"{folder}: import flowformer.interop.hf, then AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0
