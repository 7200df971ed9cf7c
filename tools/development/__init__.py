"""Tools of a checkout, not in the wheel: training of the embedded models, random checkpoints, coverage of Ascend lowerings."""
