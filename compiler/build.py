"""A build: plan -> weights -> graphs -> certificates -> manifest. Only what has changed is made again.

Every file that depends on content has a digest of its sources in its name, so a build never overwrites a
file that the artifact already there refers to: the old manifest stays valid until the new one replaces it by a rename,
and only then are files that nothing refers to removed. What an interrupted build had finished is noted in a journal and
is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..runtime.artifact import SIGNATURE, AscendInfo, FileSpec, Manifest, read_manifest, write_manifest
from ..runtime.backends.ascend import torchair_host
from ..runtime.files import write_atomically
from ..runtime.locks import alone
from ..weights.weight_map import match
from .build_record import build_info
from .digests import digest, intact
from .fingerprint import fingerprint, weights_key
from .inputs import BuildInputs, prepare
from .leftovers import LOCK, is_ours, remove_unreferenced
from .model_card import is_card, store_card
from .options import Options
from .progress import Progress
from .stored_graphs import store_graphs
from .stored_weights import open_checkpoint, store_weights


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a build."""

    manifest: Manifest  # as it was written
    traced: tuple[str, ...]  # names of compiled graphs
    reused: tuple[str, ...]  # names of graphs that were there already
    converted: bool  # whether weights were converted


def build(options: Options, progress: Progress | None = None) -> Report:
    """Compile a checkpoint into the artifact folder `options.out`."""
    inputs = prepare(options, progress or Progress())
    _check_target(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with _locked(options.out), _disk_errors(options.out):
        return _build(inputs)


def _build(inputs: BuildInputs) -> Report:
    options, old = inputs.options, inputs.old
    if inputs.packing or not old:
        # Refuse what cannot be compiled first, then what cannot be stored; only then is all of the checkpoint read.
        _check_compiler(options)
        match(inputs.config, open_checkpoint(inputs).tensors)
    source = fingerprint(options, old.build.source if old else {}, inputs.progress)
    key = weights_key(source, inputs.config, options, inputs.packing)
    folder, setting_files = _settings(inputs)
    weights = store_weights(inputs, key, folder)
    graphs = store_graphs(inputs, key, weights.of_stages)
    first, *later = graphs.stages
    manifest = Manifest(
        backend=options.backend,  # type: ignore[arg-type]
        quant=options.stored_quant,
        tp=options.tp,
        model=inputs.info,
        tokenizer=folder,
        cache=first.cache,
        graphs=first.graphs,
        weights=first.weights,
        stages=tuple(later),
        files={**graphs.files, **weights.files, **setting_files},
        ascend=_ascend_info(inputs, traced=bool(graphs.traced)) if options.backend == "ascend" else None,
        build=build_info(inputs, key, source),
    )
    write_manifest(inputs.out, manifest)
    manifest = read_manifest(inputs.out)
    store_card(options, manifest, old, inputs.progress)
    _tidy(inputs, manifest)
    return Report(manifest=manifest, traced=graphs.traced, reused=graphs.reused, converted=weights.converted)


def _check_compiler(options: Options) -> None:
    """Raise ArtifactError where a package that compiles the graphs is missing."""
    if options.backend == "ascend":
        torchair_host.wheel_folder()


def _ascend_info(inputs: BuildInputs, *, traced: bool) -> AscendInfo:
    """The versions that the graphs depend on. They are in the keys of graphs, so they are unchanged where none was traced."""
    if inputs.old and inputs.old.ascend and not traced:
        return inputs.old.ascend
    from ..runtime.backends.ascend.kernel import ascend_info

    torchair_host.load()
    return ascend_info(torchair_host.VERSION, inputs.options.soc)


# ---- the folder


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BuildError(f"--out {out} is a file; expected a folder, new or made by an earlier compile")
    if out.is_dir():
        foreign = [p.name for p in out.iterdir() if not is_ours(p) and not is_card(p)]
        if foreign and not (out / "manifest.json").exists():
            raise BuildError(
                f"--out {out} holds other files ({foreign[0]}, ...); give a new folder or an artifact of an earlier compile"
            )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build at a time in one folder."""
    with alone(out / LOCK) as free:
        if not free:
            raise BuildError(f"another staticvl compile is writing {out}; wait for it or choose another --out")
        yield


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"the disk of {out} is full; free some space and run the same command again: finished parts are kept, and an "
                "artifact that was there before is unchanged"
            ) from error
        raise


# ---- settings and the end


def _settings(inputs: BuildInputs) -> tuple[str, dict[str, FileSpec]]:
    """Write the tokenizer and the chat template into a folder named after their contents."""
    digests = {Path(name).name: hashlib.sha256(data).hexdigest() for name, data in sorted(inputs.settings.items())}
    folder = f"tokenizer-{digest(digests)[:12]}"
    (inputs.out / folder).mkdir(exist_ok=True)
    files = {}
    for name, data in inputs.settings.items():
        file = f"{folder}/{Path(name).name}"
        files[file] = FileSpec(nbytes=len(data), sha256=digests[Path(name).name])
        if not intact(inputs.out / file, files[file]):
            write_atomically(inputs.out / file, data)
    return folder, files


def _tidy(inputs: BuildInputs, manifest: Manifest) -> None:
    """Remove files that the manifest does not name; report files that stay, and a signature that must be made again."""
    signed = (inputs.out / SIGNATURE).exists()
    if kept := remove_unreferenced(inputs.out, manifest):
        inputs.progress.say(
            f"the earlier artifact is in use: {kept} of its files stay until it is not, and the next build or "
            f"`staticvl verify {inputs.out}` removes them; restart what serves it to serve this one"
        )
    if signed and not (inputs.out / SIGNATURE).exists():
        inputs.progress.say(
            f"the signature was of the earlier artifact and was removed; sign it again: staticvl sign {inputs.out} ..."
        )
