"""Checkpoints that are quantised already: their settings, the layouts of their tensors, and their form in an artifact."""
