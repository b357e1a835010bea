"""``flowformer data``."""

from __future__ import annotations

from collections.abc import Sequence

from flowformer.cli.arguments.outputs import check_folder, output_path
from flowformer.cli.arguments.parser import Parser, usable


def main(words: Sequence[str]) -> int:
    """Download a data set and verify it, or list the data sets."""
    from flowformer.tasks import downloads

    parser = Parser(prog="flowformer data", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="data set to download; lists all of them if absent", default="")
    parser.add_argument(
        "--dir",
        type=output_path,
        metavar="DIR",
        help="folder to store it in (default: the cache, where recipes look for it)",
        default=None,
    )
    values = parser.parse(words)
    if not values.name:
        for dataset in downloads.DATASETS.values():
            print(f"{dataset.name:10} {dataset.title}, {dataset.size_bytes:,} bytes from {dataset.addresses[0]}")
        return 0

    from rich.console import Console

    usable(downloads.find_dataset, values.name)
    if values.dir is not None:
        check_folder(values.dir, "--dir")
    usable(downloads.fetch, values.name, values.dir, console=Console())
    return 0
