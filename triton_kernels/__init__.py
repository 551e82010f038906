"""Triton source of edgefed's kernels, one file per op; imports only torch and triton, and both lazily.

Installed as ``edgefed.triton_kernels``: the bare name belongs to another project. Each op has a plain PyTorch
reference under ``edgefed.kernels`` that is its specification.

    sort_pairs          (token, k) pairs by slot, and the tiles of work, all on the device
    grouped_matmul      rows times the matrix of their slot: 16/32-bit, NF4 or INT8, transposed or not
    grouped_outer       weight gradients, and column sums for biases
    gate                the backward pass of SwiGLU, with the gradient of the gate weights
    combine             the sum over the pairs of a token, and its backward pass
    masked_experts      the op: launches the above inside autograd
    neuron_energy       the energies of neurons, beside the products
    router_statistics   the sums of the activation profile in one pass
    quantize            quantization and dequantization of NF4 and INT8

For compute capability 8.0 and later, Triton 3.3 and later (from 3.5 on without spills). No kernel adds floats
atomically, so results are bitwise reproducible. A forward pass never synchronizes with the host.
"""
