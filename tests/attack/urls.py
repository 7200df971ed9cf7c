"""URLs of images that lead inside, elsewhere, or to hosts that never end."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import Attempt, Kind
from .hosts import BAD, Host, hosting
from .mutate import shuffled
from .server import REFUSALS, Target, checked, judged, request, serving

# Names of addresses inside, beside those of test_server_images.py; none needs a name server.
NAMES = (
    "localhost.", "LOCALHOST", "127.0.0.1.", "127.0.1", "127.255.255.254", "0", "0x7f.1", "0x7F000001",
    "017700000001", "0177.0.0.01", "127.0.0.1%00", "127.0.0.1%2e", "[0:0:0:0:0:0:0:1]", "[::1%25lo]", "[::ffff:0:127.0.0.1]",
    "[0:0:0:0:0:ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
    "①②⑦.⓪.⓪.①", "１２７.０.０.１", "127。0。0。1",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "user@127.0.0.1", "user:password@localhost", "8.8.8.8@127.0.0.1", "127.0.0.1\\@8.8.8.8",
    "4294967297", "0xffffffff7f000001", "192.0.0.8",
    "198.18.0.1", "240.0.0.1", "[2001:db8::1]",
)  # fmt: skip
HOSTNAME = socket.gethostname()
SCHEMES = (
    "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:70/_x",
    "dict://127.0.0.1:11211/stat", "jar:http://127.0.0.1!/x", "javascript:alert(1)", "unix:/tmp/x", "data:", "data:,x",
    "data:image/png", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,====",
    "data:image/png;base64,A", "data:image/svg+xml;base64,PHN2Zy8+", "DATA:image/png;base64,AAAA",
    "data:text/html;base64,AAAA", "", " ", "x", "/etc/passwd", "\\\\host\\share", "//127.0.0.1/x", "http:", "http:/",
    "http://", "http:///", "http:////127.0.0.1", "https://127.0.0.1:1/", "http://:80/", "http://[", "http://[]/",
    "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://127.0.0.1:x/", "http://127.0.0.1:0/",
    "http://127.0.0.1:1/", "http:// 127.0.0.1/", "http://127.0.0.1 /", "http://\t127.0.0.1/", "http://127.0.0.1\r\nHost: y/",
    "http://127.0.0.1/\r\nA: b", "http://127.0.0.1/%0d%0aA:%20b", "http://127.0.0.1\0/", "http://a..b/", "http://-/",
    "http://" + "a" * 64 + "/", "http://" + "a." * 200 + "/", "http://" + "x" * 100_000,
    "http://127.0.0.1:1/" + "x" * 100_000, "http://\ud800/", "http://\u202e1.0.0.721/", "http://xn--/", "http://xn--0/",
    "view-source:http://127.0.0.1", "blob:http://127.0.0.1/x", "about:blank", "http+unix://%2ftmp%2fx/", "ws://127.0.0.1/",
    "httpx://127.0.0.1/", "h\u0442tp://127.0.0.1/",
)  # fmt: skip
TARGETS = (
    "file:///etc/passwd", "ftp://127.0.0.1/", "data:image/png;base64,AAAA", "gopher://127.0.0.1/", "//127.0.0.1:1/", "http:",
    "http://", "http://[", "?", "#", "", " ", "\0", "/to?/chain", "http://127.0.0.1:99999/", "javascript:1", "x" * 100_000,
    "http://\ud800/", "/chain", "/image", "\\\\127.0.0.1", "http://2130706433:1/", "http://a\tb/",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    """`public` reaches public addresses only, `private` all of them."""

    public: Target
    private: Target | None
    host: Host
    menu: tuple[tuple[bool, str], ...]  # whether of the private server, and a URL


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    with (
        hosting() as host,
        serving(folder, "urls") as public,
        serving(folder, "urls-private", "--allow-private-urls") as private,
    ):
        yield Ground(public, private, host, tuple(menu(host.port)))


def menu(port: int) -> list[tuple[bool, str]]:
    from ..test_server_images import INSIDE  # which imports a client of OpenAI's

    inside = [f"http://{name}:{port}/image" for name in (*INSIDE, *NAMES, HOSTNAME)]
    hosts = [f"http://127.0.0.1:{port}/{name}" for name in BAD]
    hosts += [f"http://127.0.0.1:{port}/status?{status}" for status in (204, 304, 401, 407, 418, 500, 999)]
    hosts += [f"http://127.0.0.1:{port}/to?{urllib.parse.quote(target, errors='surrogatepass')}" for target in TARGETS]
    hosts += [
        f"http://127.0.0.1:{port}/to?http://{name}:{port}/{path}"
        for name in ("localhost", "2130706433")
        for path in ("image", "drip", "chain")
    ]
    return shuffled([(False, url) for url in (*inside, *hosts, *SCHEMES)] + [(True, url) for url in (*hosts, *SCHEMES)])


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    private, url = ground.menu[index % len(ground.menu)]
    if private and ground.private:
        return Attempt(f"{url[:200]!r}, private addresses allowed", checked(ground.private, lambda: _ask(ground.private, url)))  # type: ignore[arg-type]
    return Attempt(f"{url[:200]!r}", checked(ground.public, lambda: _refused(ground, url)))


def _ask(target: Target, *urls: str) -> str:
    body = json.dumps(asking(*urls))
    return judged(*target.ask(body.encode(errors="surrogatepass")))


def _refused(ground: Ground, url: str) -> str:
    """The host must not even see a request."""
    seen = len(ground.host.seen)
    ending = _ask(ground.public, url)
    return ending if len(ground.host.seen) == seen else f"reaches an address inside: {ground.host.seen[seen:]}, {ending}"


def asking(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return request(messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]}], max_tokens=2)


KIND = Kind(
    name="urls",
    what="schemes, names and numbers of loopback, redirects, hosts that drip, lie or never end",
    endings=(*REFUSALS, "answer"),
    limit_s=30,
    count=300,
    ground=ground,
    make=make,
    inside=False,
)
