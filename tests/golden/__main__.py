"""``python -m tests.golden FOLDER``: compares every file of recorded numbers in a folder with what ours computes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import check, load_readers


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each file; return 1 if one differs or is unknown, or if there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of .safetensors files")
    folder = parser.parse_args(arguments).folder
    load_readers()
    results = [check(path) for path in sorted(folder.glob("*.safetensors"))]
    for _, line in results:
        print(line)
    same = sum(one for one, _ in results)
    print(f"{same} of {len(results)} files in {folder} are the same")
    return 0 if results and same == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
