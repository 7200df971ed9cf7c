"""Vision-language models compiled to graphs of fixed, bucketed shapes; `staticvl.runtime` loads and runs them.

Installed as `staticvl/` itself (setup.py). Importing it imports nothing else: `__version__` is looked up when it is read.
"""

__version__: str  # as installed


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib.metadata import version

    return version("staticvl")
