"""The steps of a run: the loop, evaluation, and when checkpoints are made."""
