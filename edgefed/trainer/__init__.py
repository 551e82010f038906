"""One round of training on a device: plan, local steps, update."""
