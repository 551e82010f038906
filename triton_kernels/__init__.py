"""Triton source of edgefed's kernels, one file per op; imports torch and triton only, and nothing until it is used.

Installed as ``edgefed.triton_kernels``: the bare name belongs to another project. Each op has a plain PyTorch
reference under ``edgefed.kernels`` that is its specification.

    sort_pairs          (token, k) pairs by slot, and the tiles of work, all on the device
    grouped_matmul      rows times the matrix of their slot: 16/32-bit, NF4 or INT8, either way round
    grouped_outer       weight gradients, and column sums for biases
    gate                SwiGLU backwards, with the gradient of the gate weights
    combine             the pairs of a token added up, and its backward pass
    masked_experts      the op: launches the above inside autograd
    router_statistics   the profiling record in one pass
    quantize            NF4 and INT8, to and from

For compute capability 8.0 and later, Triton 3.6 and later. No kernel adds floats atomically: results are bit for bit
the same from run to run. No host synchronisation in a forward pass.
"""
