"""`edgefed bench`: measures this device. Nothing here prints; `edgefed.cli.bench` does.

    run        the whole benchmark              speed          the speed tests and their session
    statistics samples, verdicts, `Entry`       compute        copies, matrix products, experts
    report     the report and its JSON          capacity       memory and disk
    formats    CSV, Markdown, device profile    sustain        sensors and the sustained run
    compare    two reports                      training_step  training and profiling
    plot       the figure of a report           network        the connection to the aggregator
    planning   what fits                        models         the models that are measured
    options    options and modes

A failed measurement never ends the benchmark: a test that cannot run, runs out of memory or loses its device becomes an
`Entry` with the reason, and the other tests run.
"""
