"""Merging of experts: clustering, neuron alignment, merge plans."""
