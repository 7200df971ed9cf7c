"""Draws the boxes of an answer into the image.

    python examples/boxes.py
    python examples/boxes.py --artifact qwen-vl --image cat.jpg --question "Where is the cat? Answer with its box."

prints the answer, each box in pixels of the image, and the file that was written:

    [0.60, 0.00, 0.95, 0.35]
    box (288, 0, 456, 168)
    wrote boxes.png

`staticvl generate --draw` does the same from the command line. Without --artifact an embedded tiny model answers. It is
compiled into demo-artifact, a line for each graph, when it is missing.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from staticvl import runtime
from staticvl.tools.demo import IMAGE, embedded_artifact

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: the red circle."
COLOUR = (255, 0, 80)


def drawn(path: Path, out: runtime.Output) -> Image.Image:
    """The image as people see it, with a frame for each box and a closed line for each quadrilateral."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    pen, width = ImageDraw.Draw(image), max(2, min(image.size) // 150)
    for box in out.boxes:
        if box.quad:  # Qwen-VL may write four points
            pen.line([*box.quad.pixels, box.quad.pixels[0]], fill=COLOUR, width=width)
        else:
            pen.rectangle(box.pixels, outline=COLOUR, width=width)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="folder that staticvl compile wrote; default: the embedded model")
    parser.add_argument("--image", type=Path, default=IMAGE, help="default: a drawing of three shapes")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--out", type=Path, default=Path("boxes.png"), help="the image to write; default: boxes.png")
    args = parser.parse_args()

    with runtime.load(args.artifact or embedded_artifact()) as model:
        out = model.generate(args.question, images=[args.image], max_new_tokens=128)
    print(out.text)
    for box in out.boxes:
        print(f"box {box.label}: {box.pixels}" if box.label else f"box {box.pixels}")
    drawn(args.image, out).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
