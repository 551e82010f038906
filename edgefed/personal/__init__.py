"""FedMoE (arXiv 2402.01350): every client trains a model of its own together with a small shared extractor.

A client's own model never leaves it. `mixture.LocalMixture` is what a client trains, `extractors` has what is
exchanged, and `trainer` trains a round. `edgefed.methods.fedmoe` has the hyper-parameters and the server half.
"""
