"""Bad inputs by the thousand, each of which must end in an answer of a stated kind; `python -m tests.attack`."""
