"""A plugin for pytest: core-seconds of every file and of the slowest tests, also with `-n`.

    python -m pytest -p tests.cpu_times tests/test_build.py

Times are those of the process and of its children that have ended, so a busy machine lengthens them little. A fixture counts
for the test that uses it first. With `-n`, the imports of test files count once for each worker.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FILES, TESTS = 40, 25  # lines of the two tables
IMPORTS = "(imports of test files)"


def core_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


class CpuTimes:
    """Core-seconds by test; the key of imports is IMPORTS."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, Any, Any]:
        before = core_seconds()
        try:
            return (yield)
        finally:
            self.seconds[IMPORTS] += core_seconds() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        before = core_seconds()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] += core_seconds() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self) -> Generator[None, Any, Any]:
        """A worker of xdist hands its times to the controller."""
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["cpu_times"] = json.dumps(self.seconds)
        return (yield)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.seconds.update(json.loads(getattr(node, "workeroutput", {}).get("cpu_times", "{}")))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        files: Counter[str] = Counter()
        for name, seconds in self.seconds.items():
            files[name.partition("::")[0]] += seconds
        tests = Counter({name: seconds for name, seconds in self.seconds.items() if "::" in name})
        for title, table, lines in (("file", files, FILES), ("test", tests, TESTS)):
            terminalreporter.section(f"core-seconds by {title}, {sum(table.values()):.0f} in all")
            for name, seconds in table.most_common(lines):
                terminalreporter.write_line(f"{seconds:8.1f}  {Path(name)}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTimes(config), "cpu-times")
