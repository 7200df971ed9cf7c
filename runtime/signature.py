"""Signatures of artifacts: Ed25519 over the digest that seals the manifest, and with it every file that the manifest lists.

A digest says that files are as they were written; a signature says who wrote them. The file SIGNATURE beside the manifest holds
the signed digest and the signature as JSON. Keys are PEM files.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import msgspec

from .artifact import SIGNATURE, ArtifactError, Manifest, Record
from .files import read_regular, write_atomically

_PURPOSE = b"staticvl artifact, manifest digest "  # so that a signature of anything else is not valid here


class _Signed(Record, frozen=True, kw_only=True):
    digest: str
    signature: str  # base64


class KeyFileError(ValueError):
    """A key that cannot be read or written; the message says why."""


def new_key(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner alone, and its public key beside it, whose path is returned."""
    serialization, ed25519 = _library()
    private, public = ed25519.Ed25519PrivateKey.generate(), path.with_name(path.name + ".pub")
    pem = serialization.Encoding.PEM
    private_pem = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_pem = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((path, private_pem, 0o600), (public, public_pem, 0o644)):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
                opened.write(data)
        except FileExistsError:
            raise KeyFileError(f"{file} exists already; give another name, or remove it") from None
    return public


def sign(folder: Path, manifest: Manifest, key: Path) -> None:
    """Sign the artifact in `folder`; its files must be verified before."""
    serialization, ed25519 = _library()
    try:
        private = serialization.load_pem_private_key(read_regular(key, 1 << 16), None)
    except (ValueError, TypeError) as error:  # of another form, or under a password
        raise KeyFileError(_no_key(key, "private", error)) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise KeyFileError(_no_key(key, "private", "it is of another kind"))
    signature = base64.b64encode(private.sign(_message(manifest))).decode()
    write_atomically(folder / SIGNATURE, msgspec.json.encode(_Signed(digest=manifest.digest, signature=signature)) + b"\n")


def check_signature(folder: Path, manifest: Manifest, key: Path) -> None:
    """Raise ArtifactError unless the artifact was signed with the private key that belongs to the public key in `key`."""
    public, path = _public(key), folder / SIGNATURE
    remedy = f"use one that was signed with it (`staticvl sign {folder} --key PRIVATE`), or give the key that belongs to it"
    try:
        signed = msgspec.json.decode(read_regular(path, 1 << 16), type=_Signed)
        signature = base64.b64decode(signed.signature, validate=True)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not signed, and {key} was given to check its signature; {remedy}") from None
    except (msgspec.MsgspecError, ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} is no signature ({error}); {remedy}") from error
    if signed.digest != manifest.digest:
        raise ArtifactError(f"{path} is of another manifest than the one that is there: it was compiled since; {remedy}")
    from cryptography.exceptions import InvalidSignature  # pyright: ignore[reportMissingImports]

    try:
        public.verify(signature, _message(manifest))
    except InvalidSignature:
        raise ArtifactError(f"{path} was not made with the key that belongs to {key}; {remedy}") from None


def is_stale(folder: Path, manifest: Manifest) -> bool:
    """Whether there is a signature that is not of this manifest."""
    try:
        return msgspec.json.decode(read_regular(folder / SIGNATURE, 1 << 16), type=_Signed).digest != manifest.digest
    except FileNotFoundError:
        return False
    except (msgspec.MsgspecError, OSError, RecursionError):
        return True


def _public(key: Path) -> Any:
    serialization, ed25519 = _library()
    try:
        public = serialization.load_pem_public_key(read_regular(key, 1 << 16))
    except ValueError as error:
        raise KeyFileError(_no_key(key, "public", error)) from error
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise KeyFileError(_no_key(key, "public", "it is of another kind"))
    return public


def _no_key(key: Path, which: str, why: object) -> str:
    return f"{key} is no {which} Ed25519 key in PEM ({str(why)[:200]}); `staticvl sign --new-key FILE` makes a pair"


def _message(manifest: Manifest) -> bytes:
    return _PURPOSE + manifest.digest.encode()


def _library() -> tuple[Any, Any]:
    """Modules of the package cryptography, which only signatures need; raises ArtifactError where it is missing."""
    try:
        from cryptography.hazmat.primitives import serialization  # pyright: ignore[reportMissingImports]
        from cryptography.hazmat.primitives.asymmetric import ed25519  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ArtifactError(f"signatures need the package cryptography ({error}); pip install 'staticvl[sign]'") from None
    return serialization, ed25519
