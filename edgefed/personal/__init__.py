"""FedMoE (arXiv 2402.01350): every client trains a model of its own, and a small shared extractor beside it.

A client's model never leaves it. `mixture.LocalMixture` is what a client trains; `extractors` are what travels;
`edgefed.methods.fedmoe` holds the hyper-parameters and the aggregator's half; `edgefed.personal.trainer` does a
round of it.
"""
