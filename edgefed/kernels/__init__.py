"""The numerical core: one file per operation, each with a plain PyTorch reference that is its specification."""
