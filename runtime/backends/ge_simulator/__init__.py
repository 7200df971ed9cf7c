"""A simulator of GE graphs, with torch on a CPU."""
