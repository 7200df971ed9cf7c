"""Checkpoints that are quantised already: what their settings say, how their tensors are packed, and what is stored of them."""
