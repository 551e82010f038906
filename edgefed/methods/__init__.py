"""Federated methods: one paper, one file, client half and server half side by side.

A method sees the model only as `edgefed.expert_records` and the wire's unit list; it knows neither torch,
transformers nor HTTP. `registry.make_method` builds one from its name and options.
"""
