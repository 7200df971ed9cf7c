"""Training of the miniature checkpoints: packing, data, probe, loop and evaluation, and one file per model family."""
