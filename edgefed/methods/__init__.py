"""Federated methods: one paper, one file, with the client half and the server half side by side.

A method sees the model only as `edgefed.expert_records` and the unit list of the protocol; it imports neither torch,
transformers nor HTTP. `registry.make_method` builds a method from its name and options.
"""
