"""Many devices on one machine, as real processes over loopback."""
