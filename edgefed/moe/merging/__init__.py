"""Merging several experts into one: similarity and clustering, neuron alignment, merge plans."""
