"""Mixed traffic with kills and restarts leaves nothing behind; benchmarks/serve_soak.py says what it is made of."""

from __future__ import annotations

import pytest

from benchmarks.serve_soak import KINDS, run


@pytest.mark.slow
def test_mixed_traffic() -> None:
    report = run(requests=600, clients=8, seed=1)
    assert report["faults"] == 0
    assert report["requests"] == 600
    assert set(KINDS) <= set(report["kinds"])
    assert max(report["growth_mb"]) < 20
