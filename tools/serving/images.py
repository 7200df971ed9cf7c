"""Images of a request: from data: and http(s) URLs to decoded images, within the server's limits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image

from ...runtime.processor.image_data import decode_data_url, is_data_url
from ...runtime.processor.image_files import Alpha, load_image
from ...runtime.processor.image_memory import release_memory
from ...runtime.processor.image_urls import ImageError, download
from ...runtime.processor.images import Frame
from ...runtime.shown import quoted
from .addresses import connect_publicly
from .settings import Settings

FETCHES = 16  # downloads at once


class ImageLoader:
    """A loader of images. Downloads have threads of their own, so that slow hosts delay no other request."""

    def __init__(self, settings: Settings, alpha: Alpha) -> None:
        self.settings = settings
        self.alpha: Alpha = alpha
        self._fetching = ThreadPoolExecutor(FETCHES, "staticvl-fetch")
        self._decoding = ThreadPoolExecutor(1, "staticvl-decode")

    async def fetch(self, urls: Sequence[str]) -> list[bytes]:
        """The files at URLs, not decoded; raises ImageError."""
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._fetching, self._fetch, i, url) for i, url in enumerate(urls)))

    async def decode(self, files: Sequence[bytes]) -> list[Image.Image]:
        """RGB images; raises ImageError."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, partial(self._decode_all, files))

    async def free(self, frames: Sequence[Frame]) -> None:
        """Give the memory of decoded images back to the system, once they are no longer used."""
        pixels = sum(frame.image_width * frame.image_height for frame in frames)
        await asyncio.get_running_loop().run_in_executor(self._decoding, release_memory, pixels)

    def close(self) -> None:
        for pool in (self._fetching, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, index: int, url: str) -> bytes:
        most = self.settings.max_image_bytes
        if is_data_url(url):
            return decode_data_url(url, most)
        if url.partition(":")[0].lower() not in ("http", "https"):
            raise ImageError(
                f"image {index + 1} is {quoted(url)}; expected an http, https or data:image/...;base64,... URL (files "
                "of the server are not read)"
            )
        connect = None if self.settings.allow_private_urls else connect_publicly
        return download(url, timeout_s=self.settings.fetch_s, max_bytes=most, connect=connect)

    def _decode_all(self, files: Sequence[bytes]) -> list[Image.Image]:
        return [self._decode(index, data) for index, data in enumerate(files)]

    def _decode(self, index: int, data: bytes) -> Image.Image:
        file = io.BytesIO(data)
        file.name = f"image {index + 1}"  # type: ignore[attr-defined]  (what messages call it)
        limits = self.settings
        return load_image(
            file, alpha=self.alpha, max_pixels=limits.max_image_pixels, max_side=limits.max_image_side,
            max_ratio=limits.max_image_ratio,
        )  # fmt: skip
