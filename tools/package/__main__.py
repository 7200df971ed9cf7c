"""`python -m staticvl`: the command line."""

import sys
from importlib import import_module

if __name__ == "__main__":  # named, since this file is installed in another folder than it is kept in
    sys.exit(import_module("staticvl.tools.cli").main())
