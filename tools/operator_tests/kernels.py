"""A folder of lowered cases: the kernel of each in a file like those of an artifact, and a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from ...runtime.artifact import Artifact, FileSpec
from ...runtime.backends.ascend import torchair_host
from ...runtime.backends.ascend.backend import Device
from ...runtime.backends.ascend.kernel import Kernel, load_graph, load_kernel
from ...runtime.backends.ascend.weight_layout import NZ, WeightForm, forms_in_nz, weight_layout
from ...runtime.backends.ge_simulator import ge_graph
from .case import Case, Numbers, Setting
from .cases import cases
from .forms import Form, artifact_forms
from .lowering import lower
from .outcome import CASES, REFUSED, CaseInfo, Lowered, LoweredCases, Outcome, first_line
from .running import run_case
from .tolerances import OPERATOR


def lower_artifact(artifact: Artifact, folder: Path) -> None:
    """Lower the cases of an artifact into an empty folder. Loads torchair, which no process that sees a card can."""
    torchair_host.load()
    setting = Setting(dtype=artifact.manifest.cache.dtype, quant=artifact.manifest.quant)
    lower_forms(artifact_forms(artifact), setting, folder)


def lower_forms(forms: dict[Form, tuple[str, ...]], setting: Setting, folder: Path) -> None:
    """The same for these forms, with the kinds of graphs that have them."""
    lowered: list[Lowered] = []
    for form, graphs in forms.items():
        for place, case in enumerate(cases([form], setting)):
            info = CaseInfo(case.name, dict(case.form.sizes), case.operators, case.watches, graphs)
            lowered.append(_lowered(case, Lowered(info, form, place), setting, _file(folder, len(lowered))))
    (folder / CASES).write_bytes(msgspec.json.encode(LoweredCases(setting.dtype, setting.quant, tuple(lowered))))


def _lowered(case: Case, lowered: Lowered, setting: Setting, file: Path) -> Lowered:
    try:
        emitted = lower(case, setting)
    except Exception as error:  # torchair raises exceptions of any type; the other cases are tested all the same
        return replace(lowered, error=f"it could not be lowered: {first_line(error)}")
    file.write_bytes(emitted.data)
    return replace(lowered, weights=emitted.weights)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.kernel"


def read_cases(folder: Path) -> LoweredCases:
    return msgspec.json.decode((folder / CASES).read_bytes(), type=LoweredCases)


def run_folder(folder: Path, device: Device, first: int = 0) -> Iterator[Outcome]:
    """Run the cases of a folder, from one on. It ends after one that is refused: an error may leave a card unusable for the
    process."""
    everything = read_cases(folder)
    setting = Setting(dtype=everything.dtype, quant=everything.quant)
    for number, lowered in enumerate(everything.cases[first:], first):
        if lowered.error:
            yield Outcome(lowered.case, REFUSED, OPERATOR[setting.dtype], error=lowered.error)
            return
        case = cases([lowered.form], setting)[lowered.place]
        kernel = _kernel(_file(folder, number))
        own = replace(device, in_nz=_forms_in_nz(_file(folder, number), device))
        operands = case.operands(Numbers(setting.torch_dtype))
        outcome = run_case(lowered.case, operands, kernel, lowered.weights, setting, own)
        yield outcome
        if outcome.status == REFUSED:
            return


def _kernel(file: Path) -> Kernel:
    compiled = file.parent / "compiled"
    compiled.mkdir(exist_ok=True)
    return load_kernel(file, _spec(file), compiled)


def _forms_in_nz(file: Path, device: Device) -> frozenset[WeightForm]:
    """The layout of weights that an artifact would have on the device."""
    if not device.name.startswith("npu") or weight_layout() != NZ:
        return frozenset()
    return forms_in_nz([ge_graph.parse(load_graph(file, _spec(file)))])


def _spec(file: Path) -> FileSpec:
    data = file.read_bytes()
    return FileSpec(nbytes=len(data), sha256=digest(data))


def digest(data: bytes) -> str:
    """As load_kernel expects it of a file."""
    return hashlib.sha256(data).hexdigest()
