"""What onnxruntime is told about threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from staticvl.runtime.artifact import ArtifactError, CacheSpec, WeightSpec
from staticvl.runtime.backends import ort

from .fakes import FACTS, fake_manifest

ENTRIES = ("session.intra_op.allow_spinning", "session.intra_op.spin_duration_us", "session.force_spinning_stop")


def entries() -> list[str]:
    options = ort._options(pack=True, threads=2)
    found = []
    for name in ENTRIES:
        try:
            found.append(options.get_session_config_entry(name))
        except RuntimeError:  # not set
            found.append("")
    return found


def test_cores_sleep_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATICVL_SPIN_US", raising=False)
    assert entries() == ["0", "", ""]
    monkeypatch.setenv("STATICVL_SPIN_US", "0")
    assert entries() == ["0", "", ""]
    monkeypatch.setenv("STATICVL_SPIN_US", "20")
    assert entries() == ["1", "20", "1"]
    for wrong in ("soon", "-1", "1.5", ""):
        monkeypatch.setenv("STATICVL_SPIN_US", wrong)
        with pytest.raises(ArtifactError, match=f"STATICVL_SPIN_US is '{wrong}'; expected microseconds"):
            entries()


@pytest.mark.parametrize(
    ("nbytes", "given", "cores", "pack"),
    [
        (ort.SMALL - 1, None, (None, 1), True),
        (ort.SMALL - 1, 2, (2, 1), True),
        (ort.SMALL, None, (None, None), False),
        (ort.SMALL, 2, (2, None), False),
    ],
)
def test_small_models_run_on_one_core_and_are_packed_in_every_session(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nbytes: int,
    given: int | None,
    cores: tuple[int | None, int | None],
    pack: bool,
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(ort, "OrtBackend", lambda *_, **settings: made.append(settings))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.safetensors").touch()
    weight = WeightSpec(file="weights/a.safetensors", dtype="float32", shape=(nbytes // 4,), offset=0, nbytes=nbytes)
    cache = CacheSpec(layers=1, kv_heads=1, head_dim=4, context=8, rows=12, slots=1, dtype="float32")
    manifest = msgspec.structs.replace(fake_manifest(FACTS, cache, ()), weights={"text.embed.weight": weight})
    ort.open_ort(tmp_path, cache, threads=given, manifest=manifest)
    assert [(each["threads"], each["few_cores"], each["pack"]) for each in made] == [(*cores, pack)]
