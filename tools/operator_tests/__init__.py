"""Tests of single operators, for a card: the calls that an artifact's graphs make, at their true sizes, without weights."""
