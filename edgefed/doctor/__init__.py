"""`edgefed doctor`: what is missing or wrong on this device, and what to do about it.

Each file turns one kind of evidence into findings. What the evidence means is decided by pure functions (facts in,
findings out); what could take the interpreter down with it (torch, CUDA, compiled kernels) is asked in a worker
process. Nothing here prints.
"""
