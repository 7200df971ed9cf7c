"""Images that strangers send or point at: what may be fetched, and what may be decoded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import io
import ipaddress
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from staticvl.runtime.processor import image_urls
from staticvl.runtime.processor.image_urls import ImageError, download
from staticvl.tools.serving import addresses
from staticvl.tools.serving.addresses import connect_publicly, is_public

from .fakes import noise
from .servers import Running, asking, data_url, far_model, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = far_model(tmp_path_factory.mktemp("pictures") / "artifact")
    with serving(model, max_image_pixels=1_000_000, max_image_side=3000, max_image_bytes=200_000, fetch_s=2) as running:
        yield running
        running.chat(asking("What?", data_url(noise(1))), max_tokens=2)


class Host(http.server.BaseHTTPRequestHandler):
    """An image at /noise.png; elsewhere redirects to what the path says."""

    seen: list[str] = []  # noqa: RUF012  (of all requests)

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path == "/noise.png":
            file = io.BytesIO()
            noise(3).save(file, "PNG")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue())
            return
        self.send_response(302)
        self.send_header("Location", self.path[1:])
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[int]:
    """The port of a host on this machine."""
    Host.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running.server_port
        running.shutdown()


def refusal(server: Running, url: str) -> str:
    """What a request with an image is told."""
    with pytest.raises(openai.BadRequestError) as raised:
        server.chat(asking("What?", url), max_tokens=2)
    assert raised.value.code == "invalid_image"
    return str(raised.value)


INSIDE = [
    "127.0.0.1",
    "localhost",
    "127.1",
    "2130706433",  # 127.0.0.1 as one number
    "0x7f000001",
    "0177.0.0.1",
    "0.0.0.0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "[fe80::1]",
    "[fc00::1]",
    "[fec0::1]",
    "[ff02::1]",
]


@pytest.mark.parametrize("name", INSIDE)
def test_addresses_inside_are_refused(server: Running, host: int, name: str) -> None:
    """Before anything is sent there, with a sentence that does not depend on what is there."""
    assert "does not lie on the public internet" in refusal(server, f"http://{name}:{host}/noise.png")
    assert Host.seen == []


def test_what_is_public() -> None:
    public = "8.8.8.8 93.184.216.34 2606:2800:220:1::1 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
    private = "2001:db8::1 198.18.0.1 192.0.2.1 240.0.0.1 2001:0:7f00:1:0:0:80ff:fffe"
    assert all(is_public(ipaddress.ip_address(each)) for each in public.split())
    assert not any(is_public(ipaddress.ip_address(each)) for each in private.split())


@contextlib.contextmanager
def names(monkeypatch: pytest.MonkeyPatch, **known: list[str]) -> Iterator[list[str]]:
    """Hosts known to the resolver, a list of addresses each: the next at each question, the last for ever."""
    real, hosts = socket.getaddrinfo, []

    def resolve(host: str, port: int, *args: Any, **more: Any) -> Any:
        name = host.partition(".")[0]
        if name not in known:
            return real(host, port, *args, **more)
        hosts.append(host)
        answers = known[name]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [each for address in found.split() for each in real(address, port, *args, **more)]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        yield hosts


def test_names_that_lead_inside(server: Running, host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only one of several addresses does."""
    with names(monkeypatch, inner=["127.0.0.1"], mixed=["8.8.8.8 127.0.0.1"]):
        for name in ("inner.example", "mixed.example"):
            assert "public internet" in refusal(server, f"http://{name}:{host}/noise.png")
    assert Host.seen == []


def test_the_address_that_was_checked_is_the_one_that_is_used(host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private a moment later gains nothing: it is asked for once."""
    used: list[str] = []

    def opened(_family: int, _kind: int, _protocol: int, place: tuple[str, int], _timeout: float | None) -> socket.socket:
        used.append(place[0])
        return socket.create_connection(("127.0.0.1", place[1]))

    monkeypatch.setattr(image_urls, "_opened", opened)
    with names(monkeypatch, turning=["8.8.8.8", "127.0.0.1"]) as hosts:
        url = f"http://turning.example:{host}/noise.png"
        assert download(url, timeout_s=5, max_bytes=1 << 20, connect=connect_publicly)
        assert (used, hosts) == (["8.8.8.8"], ["turning.example"])
        with pytest.raises(ImageError, match="public internet"):
            download(url, timeout_s=5, max_bytes=1 << 20, connect=connect_publicly)


@pytest.mark.parametrize("target", ["http://127.0.0.1:{0}/noise.png", "http://localhost:{0}/noise.png", "http://[::1]:{0}/x"])
def test_redirects_inside_are_refused(server: Running, host: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a host that counts as public."""
    monkeypatch.setattr(addresses, "is_public", lambda address: str(address) == "127.0.0.2")
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Host) as outside:
        threading.Thread(target=outside.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.2:{outside.server_port}/"
        assert server.chat(asking("What?", f"{url}noise.png"), max_tokens=2).usage.completion_tokens <= 2
        Host.seen.clear()
        refusal_text = refusal(server, url + target.format(host))
        outside.shutdown()
    assert "public internet" in refusal_text
    assert len(Host.seen) == 1


def test_redirects_elsewhere_and_schemes(tmp_path: Path, host: int) -> None:
    with serving(far_model(tmp_path / "artifact"), allow_private_urls=True, fetch_s=5) as server:
        got = server.chat(asking("What?", f"http://127.0.0.1:{host}/noise.png"), max_tokens=2)
        assert got.usage.prompt_tokens_details.image_tokens == 64
        for target in ("file:///etc/passwd", "data:image/png;base64,AAAA"):
            assert "is not followed" in refusal(server, f"http://127.0.0.1:{host}/{target}")
        assert "unknown url type: ftp" in refusal(server, f"http://127.0.0.1:{host}/ftp://127.0.0.1/x")
        for url in ("file:///etc/passwd", "ftp://x/y", "gopher://x", "//x/y", "passwd", "", "\0"):
            assert "files of the server are not read" in refusal(server, url)
        assert "cannot be fetched" in refusal(server, "http://127.0.0.1:9/x.png")
        for url in (
            "http://",
            "http://\r\nHost: y/",
            "https://user:pass@127.0.0.1/",
            f"http://127.0.0.1:{host}@8.8.8.8:99999/",
        ):
            refusal(server, url)


def png(width: int, height: int, rows: bytes) -> str:
    """A PNG of 8-bit grey whose head says any size, and whose data is whatever is given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def raw(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def damaged_avif() -> bytes:
    """Its head is whole; its decoder raises RuntimeError."""
    head, mark, pixels = encoded(noise(1), "AVIF").partition(b"mdat")
    return head + mark + bytes(len(pixels))


HOSTILE = {
    "avif": (raw(damaged_avif(), "avif"), "image 1 is damaged or cut short"),
    "bomb": (png(30_000, 30_000, b"\0" * 1000), "image 1 is refused"),
    "limit": (png(1001, 1000, b"\0" * 1_002_000), "1001 x 1000 pixels, more than the 1000000 allowed"),
    "line": (png(1, 2900, b"\0\0" * 2900), "at most 200 times as long as each other"),
    "side": (png(3001, 100, b"\0" * 300_200), "sides of at most 3000"),
    "tape": (png(1, 40_000_000, b""), "1 x 40000000 pixels, more than the 1000000 allowed"),
    "float": (raw(encoded(Image.new("F", (9, 9), 1e6), "TIFF"), "tiff"), "values from 1e+06 to 1e+06; expected 0 to 1"),
    "nothing": (png(0, 5, b""), "image 1"),
    "short": (png(500, 500, b"\0" * 40), "damaged or cut short"),
    "half": (raw(encoded(noise(1, (200, 200)), "PNG")[:40_000]), "damaged"),
    "head": (raw(encoded(noise(1), "JPEG")[:30], "jpeg"), "image 1"),
    "text": (raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image in a known format"),
    "program": (raw(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"), "not an image in a known format"),
    "empty": (raw(b""), "not an image"),
    "large": (raw(b"\x89PNG" + bytes(300_000)), "more than the 200000 bytes allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images(server: Running, name: str, caplog: pytest.LogCaptureFixture) -> None:
    url, message = HOSTILE[name]
    said = refusal(server, url)
    assert message in said and len(said) < 700
    assert not caplog.records or all(record.levelname == "INFO" for record in caplog.records)


def test_images_at_the_limits(server: Running) -> None:
    for url in (png(1000, 1000, b"\0" * 1_001_000), png(200, 1, b"\0" * 201), png(1, 1, b"\0\0")):
        assert server.chat(asking("What?", url), max_tokens=2).usage.prompt_tokens_details.image_tokens == 64
    for form in ("JPEG", "WEBP", "GIF", "BMP"):
        url = raw(encoded(noise(5, (60, 40)), form), form.lower())
        assert server.chat(asking("What?", url), max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/PNG;BASE64,", "data:;base64,"])
def test_spellings_of_data_urls(server: Running, head: str) -> None:
    coded = base64.encodebytes(encoded(noise(5), "PNG")).decode()
    assert "\n" in coded.strip()
    assert server.chat(asking("What?", head + coded), max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize("url", ["A" * 150_000, "data:" + "A" * 150_000, "http://" + "a" * 150_000])
def test_a_refusal_never_repeats_a_long_url(server: Running, url: str) -> None:
    assert len(refusal(server, url)) < 700


def test_a_photograph_is_turned(server: Running) -> None:
    """Of a wide image that is to be shown upright, the tokens and the size are those of the upright one."""
    photo, exif = noise(5, (80, 40)), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo.save(file, "PNG", exif=exif)
    (turned,) = asyncio.run(server.service.images.decode([file.getvalue()]))
    assert turned.size == (40, 80)
    assert turned.tobytes() == photo.transpose(Image.Transpose.ROTATE_270).tobytes()
