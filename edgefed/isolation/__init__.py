"""A process for work that may crash or hang: `worker.Worker` starts it, `child` is its other end."""
