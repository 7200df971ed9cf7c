"""All seeded faults."""

from __future__ import annotations

from . import definitions, graphs, hosts, quantised, settings, weights
from .fault import Fault

FAULTS: tuple[Fault, ...] = (
    *settings.FAULTS, *weights.FAULTS, *quantised.FAULTS, *hosts.FAULTS, *graphs.FAULTS, *definitions.FAULTS,
)  # fmt: skip
