"""Formats of an export, one file each. All write a new folder, one tensor at a time."""
