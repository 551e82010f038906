"""The aggregator: the server process that hands out the global model and averages what comes back.

It moves named tensors and knows neither torch nor any model architecture, so it needs no GPU and little memory.

    rounds    the round state machine, pure          service   the rules between clients, rounds and disk
    blobs     content-addressed files                uploads   resumable parts
    store     SQLite, metadata only                  validate  the door for updates
    creation  makes a run from a checkpoint          fold      the weighted means of a round
    app       HTTP routes                            server    the process
"""
