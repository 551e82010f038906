"""Local training: user text as token blocks, and the optimizer steps of a round."""
