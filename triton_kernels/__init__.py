"""Triton source of edgefed's kernels, one file per op; imports torch and triton only.

Installed as ``edgefed.triton_kernels``: the bare name belongs to another project.
"""
