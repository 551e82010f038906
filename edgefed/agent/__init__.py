"""The device process without the model: how one client talks to an aggregator and never loses its work.

`agent.Agent` is the loop; it drives an injected `agent.Trainer` and knows neither torch nor transformers.
`transport.AggregatorClient` speaks HTTP, `backoff.Retry` decides when to ask again, `cache.BlobCache` keeps the parts
of the global model that were downloaded, `journal.Journal` remembers identity and pending work across crashes.

    STATE/agent.lock      held while a process uses the folder
    STATE/journal.json    identity and pending work (mode 0600: it holds the client key)
    STATE/ledger.jsonl    one line per round
    STATE/blobs/          downloaded units and files, each named by its SHA-256
    STATE/updates/        the trained update that is not acknowledged yet
"""
