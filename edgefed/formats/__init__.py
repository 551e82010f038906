"""Formats of an export, one file each. All write a new folder, one tensor at a time."""

DELTA_FILE = "delta.json"
"""Manifest in the folder of a delta; see `edgefed.formats.delta`."""
