"""Asks one question about every image of a folder, several at once, and writes a table.

    python examples/folder.py
    python examples/folder.py photos --artifact llava-7b --question "What is in the picture?" --out answers.jsonl

shows a progress bar, and prints what was written:

    wrote answers.csv: 1 answers, 0 errors

The table has a line for each file, in the order of their names: image, answer, error. It is CSV, or JSON lines where --out ends
with .jsonl. A file that is no image, or that cannot be answered about, has an error in place of an answer. Requests of several
threads run in one batch of the model. Without --artifact an embedded tiny model answers. It is compiled into demo-artifact, a
line for each graph, when it is missing.
"""

import argparse
import csv
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

from tqdm import tqdm

from staticvl import runtime
from staticvl.tools.demo import IMAGE, embedded_artifact

Row = dict[str, str]
COLUMNS: tuple[str, ...] = ("image", "answer", "error")


def ask(model: runtime.Model, question: str, path: Path) -> Row:
    try:
        return {"image": path.name, "answer": model.generate(question, images=[path], max_new_tokens=128).text, "error": ""}
    except (ValueError, OSError) as error:  # of this image; anything else would concern them all
        return {"image": path.name, "answer": "", "error": str(error)}


def writer(file: IO[str], jsonl: bool) -> Callable[[Row], object]:
    """A function that writes one line of the table."""
    if jsonl:
        return lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    table = csv.DictWriter(file, COLUMNS)
    table.writeheader()
    return table.writerow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with images; default: one drawing of three shapes")
    parser.add_argument("--artifact", type=Path, help="folder that staticvl compile wrote; default: the embedded model")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--out", type=Path, default=Path("answers.csv"), help="a .csv or a .jsonl; default: answers.csv")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="best as many as slots; default: 4")
    args = parser.parse_args()
    if args.folder and not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder; give one with images")
    paths = sorted(path for path in args.folder.iterdir() if path.is_file()) if args.folder else [IMAGE]

    errors = 0
    with (
        runtime.load(args.artifact or embedded_artifact()) as model,
        args.out.open("w", encoding="utf-8", newline="") as file,
        ThreadPoolExecutor(args.at_once) as pool,
    ):
        write = writer(file, args.out.suffix == ".jsonl")
        for row in tqdm(pool.map(partial(ask, model, args.question), paths), total=len(paths), unit="image"):
            write(row)
            errors += bool(row["error"])
    print(f"wrote {args.out}: {len(paths) - errors} answers, {errors} errors")


if __name__ == "__main__":
    main()
