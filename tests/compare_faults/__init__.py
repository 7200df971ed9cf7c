"""Faults seeded on purpose, one a record, that the comparison has to find and name without a hint of where to look."""
