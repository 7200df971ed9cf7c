"""For a checkout alone, no wheel has it: training of the embedded models, random checkpoints, coverage of Ascend lowerings."""
