"""A check for another artifact in the folder of the one that is served."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ...runtime.artifact import MANIFEST, Artifact, ArtifactError, read_manifest

CHECK_S = 5.0
_MISSING = "missing"
log = logging.getLogger(__name__)


class NewerArtifact:
    """A watch over an artifact's manifest, which is read when its file has changed; a note about it is logged once."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        # An artifact in memory alone was never there.
        self._last_state: Any = _MISSING if self._state() == _MISSING else None
        self.note: str | None = None

    def check(self) -> str | None:
        """A note for /health; None: the artifact is the one that is served."""
        state = self._state()
        if state != self._last_state:
            self._last_state, note = state, self._read()
            if note and note != self.note:
                log.warning("%s: %s", self._artifact.folder, note)
            self.note = note
        return self.note

    async def watch(self) -> None:
        """Check every CHECK_S seconds, so that the note is in the log without a request."""
        while True:
            await asyncio.to_thread(self.check)
            await asyncio.sleep(CHECK_S)

    def _state(self) -> Any:
        try:
            stat = self._artifact.path(MANIFEST).stat()
        except OSError:
            return _MISSING
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _read(self) -> str | None:
        try:
            digest = read_manifest(self._artifact.folder).digest
        except ArtifactError:
            return "the artifact in its folder is damaged or gone; the opened one is still served"
        if digest == self._artifact.manifest.digest:
            return None
        return "a newer artifact lies in its folder; restart the server to serve it"
