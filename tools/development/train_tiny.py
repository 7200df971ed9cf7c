"""Train a miniature vision-language model on drawings of shapes, and measure how often it is right.

The result is a small but real checkpoint: the published architecture, file layout and chat template, trained
until its answers can be checked word for word. All code is in the package ``training``.
"""

from .training.cli import main, parse_arguments
from .training.evaluation import Case, cases

__all__ = ["Case", "cases", "main", "parse_arguments"]

if __name__ == "__main__":
    main()
