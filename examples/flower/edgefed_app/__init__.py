"""edgefed on Flower."""
