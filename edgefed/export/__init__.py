"""Takes a trained global model out of edgefed, in formats that others read."""
