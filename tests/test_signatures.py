"""Artifacts that somebody answers for: signed, checked before anything of them is used, and stale once compiled again."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import SIGNATURE, ArtifactError, read_manifest
from staticvl.tools.cli import main

from .conftest import EMBEDDED, SMALL_BUCKETS
from .damage import flip, linked_copy, rewritten


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        assert main(["sign", "--new-key", str(folder / name)]) == 0
    return folder


@pytest.fixture
def artifact(embedded_artifact: Path, tmp_path: Path) -> Path:
    return linked_copy(embedded_artifact, tmp_path / "a")


@pytest.fixture
def signed(artifact: Path, keys: Path) -> Path:
    assert main(["sign", str(artifact), "--key", str(keys / "own")]) == 0
    return artifact


def refused(artifact: Path, key: Path) -> str:
    """Why an artifact is refused, wherever it is opened."""
    with pytest.raises(ArtifactError) as caught:
        runtime.load(artifact, verify_key=key)
    with pytest.raises(ArtifactError) as by_verify:
        main(["--traceback", "verify", str(artifact), "--key", str(key)])
    assert str(by_verify.value) == str(caught.value)
    return str(caught.value)


def test_the_signature_is_ed25519_over_the_digest(signed: Path, keys: Path) -> None:
    """Checked by the library alone."""
    assert stat.S_IMODE((keys / "own").stat().st_mode) == 0o600
    public = serialization.load_pem_public_key((keys / "own.pub").read_bytes())
    assert isinstance(public, ed25519.Ed25519PublicKey)
    data = json.loads((signed / SIGNATURE).read_bytes())
    message = b"staticvl artifact, manifest digest " + read_manifest(signed).digest.encode()
    public.verify(base64.b64decode(data["signature"]), message)


def test_a_signed_artifact_runs(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with runtime.load(signed, verify_key=keys / "own.pub") as model:
        assert model.generate("What is in the picture?", max_new_tokens=2).token_ids
    assert main(["verify", str(signed), "--key", str(keys / "own.pub")]) == 0
    assert "signed with the key that belongs to" in capsys.readouterr().out
    command = ["generate", str(signed), "--prompt", "Hello", "--max-new-tokens", "2", "--verify-key", str(keys / "own.pub")]
    assert main(command) == 0


def test_unsigned_and_wrongly_signed(artifact: Path, signed: Path, keys: Path) -> None:
    assert "was not made with the key that belongs to" in refused(signed, keys / "other.pub")
    assert main(["sign", str(signed), "--key", str(keys / "other")]) == 0
    assert "was not made with the key that belongs to" in refused(signed, keys / "own.pub")
    for text in (b"", b"[]", b'{"digest": "x", "signature": "%%"}', b"[" * 10_000):
        rewritten(signed / SIGNATURE, text)
        assert "is no signature" in refused(signed, keys / "own.pub")
    (signed / SIGNATURE).unlink()
    assert "is not signed" in refused(signed, keys / "own.pub")
    runtime.load(signed).close()  # nobody wanted to know


def test_every_file_is_covered(signed: Path, keys: Path) -> None:
    """A weight too, which is otherwise not read to the end."""
    path = next((signed / "weights").iterdir())
    flip(path, path)
    runtime.load(signed).close()
    assert f"{path} does not match its sha256" in refused(signed, keys / "own.pub")


def test_nothing_is_run_before(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staticvl.runtime.loading.Engine", lambda *_, **__: pytest.fail("an engine was made"))
    refused(signed, keys / "other.pub")


@pytest.mark.parametrize("key", ["none", "text", "private", "rsa", "fifo"])
def test_keys_of_another_kind(signed: Path, keys: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    path = tmp_path / "key"
    if key == "text":
        path.write_text("secret")
    elif key == "private":
        shutil.copyfile(keys / "own", path)
    elif key == "rsa":
        public = rsa.generate_private_key(65537, 1024).public_key()
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(public.public_bytes(serialization.Encoding.PEM, form))
    elif key == "fifo":
        os.mkfifo(path)
    assert main(["verify", str(signed), "--key", str(path)]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert str(path) in printed
    assert main(["sign", str(signed), "--key", str(keys / "own.pub")]) == 1
    assert "is no private Ed25519 key" in capsys.readouterr().err


def test_a_key_is_not_overwritten(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (keys / "own").read_bytes()
    assert main(["sign", "--new-key", str(keys / "own")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (keys / "own").read_bytes() == before


def test_a_damaged_artifact_is_not_signed(artifact: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((artifact / "weights").iterdir())
    flip(path, path)
    assert main(["sign", str(artifact), "--key", str(keys / "own")]) == 1
    assert "does not match its sha256" in capsys.readouterr().err
    assert not (artifact / SIGNATURE).exists()


def test_compiled_again(signed: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unchanged build keeps the signature, another one removes it; one that was put back is known to be of another."""
    shutil.copyfile(signed / SIGNATURE, tmp_path / "old")
    build(Options(checkpoint=EMBEDDED, out=signed, buckets=SMALL_BUCKETS))
    runtime.load(signed, verify_key=keys / "own.pub").close()
    build(
        Options(checkpoint=EMBEDDED, out=signed, buckets=Buckets(prefill=(8,), decode=(1,), vision=(1,), context=512, slots=1))
    )
    assert not (signed / SIGNATURE).exists()
    assert "is not signed" in refused(signed, keys / "own.pub")
    shutil.copyfile(tmp_path / "old", signed / SIGNATURE)
    assert "is of another manifest" in refused(signed, keys / "own.pub")
    assert main(["show", str(signed)]) == 0
    assert "the signature is of another manifest" in capsys.readouterr().out


def test_show_says_whether(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(signed)]) == 0
    assert "yes; `staticvl verify --key` says by whom" in capsys.readouterr().out


def test_without_the_package_it_is_one_sentence(signed: Path, keys: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from staticvl.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["verify", str(signed), "--key", str(keys / "own.pub")], ["sign", str(signed), "--key", str(keys / "own")]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "pip install 'staticvl[sign]'" in done.stderr
        assert len(done.stderr.strip().splitlines()[-1:]) == 1
        assert "Traceback" not in done.stderr
