"""What a training step costs in memory and time. Pure: no torch, no files, no sensors."""
