"""A server and the folder that its artifact came from: files that cannot be opened, and an artifact that takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from staticvl import runtime
from staticvl.runtime.artifact import ArtifactError, read_manifest, write_manifest
from staticvl.runtime.opening import RunError
from staticvl.tools.serving import newer_artifact

from .damage import linked_copy
from .servers import far_model, serving, until


def test_a_graph_that_cannot_be_opened_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would meet every later request too; a run that fails is the fault of one."""
    model = far_model(tmp_path / "artifact")

    def failing(error: Exception) -> Any:
        def run(*_: Any) -> Any:
            raise error

        return run

    with serving(model) as server:
        for error, status in ((RunError("no memory"), 500), (ArtifactError("a.onnx cannot be used"), 503)):
            assert server.http.get("/health").json() == {"status": "ok"}
            monkeypatch.setattr(model.engine.backend, "run", failing(error))
            with pytest.raises(openai.InternalServerError) as raised:
                server.chat("Hello!")
            assert raised.value.status_code == status
        assert server.service.trouble == "a file of the model cannot be opened"
        until(lambda: server.server.should_exit)
        assert server.server.status == 1


def test_the_log_speaks_of_a_newer_artifact(
    embedded_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though nobody asks for the server's health; /health says the same, and of a manifest that is damaged as well."""
    monkeypatch.setattr(newer_artifact, "CHECK_S", 0.01)
    artifact = linked_copy(embedded_artifact, tmp_path / "a")
    with runtime.load(artifact) as model, serving(model) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        manifest = read_manifest(artifact)
        write_manifest(artifact, msgspec.structs.replace(manifest, quant="none "))
        until(lambda: f"{artifact}: a newer artifact lies in its folder" in caplog.text)
        assert "restart the server" in server.http.get("/health").json()["artifact"]
        assert server.http.get("/health").status_code == 200
        write_manifest(artifact, manifest)
        assert server.http.get("/health").json() == {"status": "ok"}
        (artifact / "manifest.json").unlink()
        assert "damaged or gone" in server.http.get("/health").json()["artifact"]
        assert caplog.text.count("a newer artifact lies") == 1
