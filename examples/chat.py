"""Holds a conversation about an image, which keeps its place in the cache between turns.

    python examples/chat.py
    python examples/chat.py --turns "What is in the picture?" "How many shapes are there?"
    python examples/chat.py --artifact llava-7b --image cat.jpg

Without --turns the turns are typed; an empty line or the end of input leaves. Each answer is followed by the number of prompt
tokens that were in the cache already:

    > What is in the picture?
    A red circle at the top right, a blue square at the bottom left and a black triangle at the bottom right.
    [78 prompt tokens, 0 of them in the cache]
    > How many shapes are there?
    There are three shapes.
    [112 prompt tokens, 102 of them in the cache]

Without --artifact an embedded tiny model answers. It is compiled into demo-artifact, a line for each graph, when it is missing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from staticvl import runtime
from staticvl.tools.demo import IMAGE, embedded_artifact

NEW_TOKENS = 256  # of an answer, at most


def typed() -> Iterator[str]:
    """Lines of the terminal until an empty one."""
    try:
        while line := input("> ").strip():
            yield line
    except EOFError:
        print()


def given(turns: list[str]) -> Iterator[str]:
    """Turns of the command line, shown as if they had been typed."""
    for turn in turns:
        print(f"> {turn}")
        yield turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="folder that staticvl compile wrote; default: the embedded model")
    parser.add_argument("--image", default=IMAGE, help="path or URL; default: a drawing of three shapes")
    parser.add_argument("--turns", nargs="+", metavar="TEXT", help="what is said, turn by turn; default: typed")
    args = parser.parse_args()

    with runtime.load(args.artifact or embedded_artifact()) as model, model.chat() as chat:
        images = [args.image]  # they belong to the first turn
        for turn in given(args.turns) if args.turns else typed():
            try:
                out = chat.send(turn, images, max_new_tokens=NEW_TOKENS)
            except runtime.ContextError as error:  # the turn is dropped, and a shorter one may fit
                print(f"[not sent: {error}]")
                continue
            images = []
            print(out.text)
            print(f"[{out.prompt_tokens} prompt tokens, {out.reused_tokens} of them in the cache]")


if __name__ == "__main__":
    main()
