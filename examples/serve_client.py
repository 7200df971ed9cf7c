"""Starts `staticvl serve`, asks it about an image as any client of OpenAI's interface does, and stops it.

    python examples/serve_client.py
    python examples/serve_client.py --artifact llava-7b --image cat.jpg --question "What is in the picture?"

prints the address, the answer, and the tokens that it took, beside the server's log:

    serving demo-artifact at http://127.0.0.1:40321
    A red circle at the top right, a blue square at the bottom left and a black triangle at the bottom right.
    78 prompt tokens, 25 of the answer

It needs staticvl[serve], and asks with the package `openai` where that is installed, else with Python's own urllib. Without
--artifact an embedded tiny model answers. It is compiled into demo-artifact when it is missing.
"""

import argparse
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from staticvl.tools.demo import IMAGE, embedded_artifact

HTTP = build_opener(ProxyHandler({}))  # no proxy leads to this machine


@contextmanager
def serving(artifact: Path) -> Iterator[str]:
    """The address of a new server, once it is ready; the server ends with the block."""
    command = [sys.executable, "-m", "staticvl", "serve", str(artifact), "--port", "0", "--model-name", artifact.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""  # comes when every graph is open
            if not line:
                raise SystemExit(f"the server ended with status {server.wait()} before it served; its log says why")
            print(line, end="", flush=True)
            HTTP.open(f"{(address := line.split()[-1])}/health").close()  # an error unless it is ready
            yield address
        finally:
            server.terminate()  # requests that run are finished


def request(model: str, image: Path, question: str) -> dict[str, Any]:
    url = f"data:application/octet-stream;base64,{base64.b64encode(image.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 128}


def ask(address: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        import openai
    except ImportError:
        url, data = f"{address}/v1/chat/completions", json.dumps(body).encode()
        with HTTP.open(Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        return client.chat.completions.create(**body).model_dump()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="folder that staticvl compile wrote; default: the embedded model")
    parser.add_argument("--image", type=Path, default=IMAGE, help="default: a drawing of three shapes")
    parser.add_argument("--question", default="What is in the picture?")
    args = parser.parse_args()
    artifact = (args.artifact or embedded_artifact()).resolve()
    with serving(artifact) as address:
        answer = ask(address, request(artifact.name, args.image, args.question))
    print(answer["choices"][0]["message"]["content"])
    print(f"{answer['usage']['prompt_tokens']} prompt tokens, {answer['usage']['completion_tokens']} of the answer")


if __name__ == "__main__":
    main()
