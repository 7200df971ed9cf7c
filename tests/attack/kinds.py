"""Every kind of attack by its name, in the order in which they run."""

from __future__ import annotations

from . import artifacts, checkpoints, fields, forms, images, kills, manifests, templates, urls, wire
from .case import Kind

_MODULES = (artifacts, manifests, checkpoints, images, templates, wire, fields, urls, kills, forms)
KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in _MODULES}
