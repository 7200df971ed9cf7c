"""Asks one question about one image, and prints the answer as it is made.

    python examples/describe.py
    python examples/describe.py --artifact llava-7b --image cat.jpg --question "What is in the picture?"

prints the answer, piece by piece:

    A red circle at the top right, a blue square at the bottom left and a black triangle at the bottom right.

Without --artifact an embedded tiny model answers. It is compiled into demo-artifact, a line for each graph, when it is missing.
"""

import argparse
from pathlib import Path

from staticvl import runtime
from staticvl.tools.demo import IMAGE, embedded_artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="folder that staticvl compile wrote; default: the embedded model")
    parser.add_argument("--image", default=IMAGE, help="path or URL; default: a drawing of three shapes")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    with runtime.load(args.artifact or embedded_artifact()) as model:
        for piece in model.stream(args.question, images=[args.image], max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
