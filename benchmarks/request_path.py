"""Latency that the server adds to a request: GET /health, and a chat completion of one token on a device that takes no time.

    python -m benchmarks.request_path [--requests 1000] [--bar-ms 1]

All requests use one connection. Figures are medians in milliseconds; the last line is JSON. The exit status is 1 if the median
of /health is above the limit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.servers import far_model, serving

BODY = json.dumps({"model": "model", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}).encode()


def median_ms(request: Callable[[], None], count: int) -> float:
    request()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        request()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)


def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, serving(far_model(Path(folder) / "artifact")) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)

        def ask(method: str, path: str, body: bytes | None = None) -> None:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{path} was answered with {response.status}: {response.read()[:200]!r}")
            response.read()

        medians = {
            "health_ms": median_ms(lambda: ask("GET", "/health"), count),
            "one_token_ms": median_ms(lambda: ask("POST", "/v1/chat/completions", BODY), count),
        }
        connection.close()
        return medians


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="requests of each kind; default: 1000")
    parser.add_argument(
        "--bar-ms", type=float, default=1.0, help="limit of the median of /health, in milliseconds; default: 1.0"
    )
    args = parser.parse_args()
    medians = measure(args.requests)
    above = medians["health_ms"] > args.bar_ms
    print(f"GET /health {medians['health_ms']} ms, {'above' if above else 'within'} the bar of {args.bar_ms:g} ms")
    print(json.dumps(medians))
    return int(above)


if __name__ == "__main__":
    raise SystemExit(main())
