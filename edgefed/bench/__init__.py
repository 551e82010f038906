"""`edgefed bench`: what this device really does, measured. Nothing here prints; `edgefed.cli.bench` shows it.

A measurement never ends the benchmark: what cannot run, runs out of memory or loses its device becomes an `Entry` that
says so, and the others go on.
"""
