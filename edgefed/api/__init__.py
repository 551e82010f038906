"""The Python API, one object or function for each verb of the command line, which calls exactly these.

Use them as attributes of the package: ``edgefed.Client``, ``edgefed.plan``. They are imported on first use, so that
``import edgefed`` stays quick and loads neither torch nor transformers.
"""
