"""`staticvl serve` with a shorter patience for clients that send nothing: `python -m tests.attack.serve ARTIFACT ...`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from staticvl.tools import cli
from staticvl.tools.serving import main as serving
from staticvl.tools.serving.settings import Settings

TIMEOUT_S = 1.0  # for the head and the body of a request, which the command line has no options for


def main() -> int:
    settings_of = serving.settings_of

    def impatient(*arguments: Any) -> Settings:
        return replace(settings_of(*arguments), header_s=TIMEOUT_S, body_s=TIMEOUT_S)

    serving.settings_of = impatient
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
