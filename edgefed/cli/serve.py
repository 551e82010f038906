"""``edgefed serve``: import a model once, then coordinate rounds until the run is over."""

from __future__ import annotations

import shlex

from edgefed.api.server import Server
from edgefed.cli.options import command


@command("serve", Server)
def serve_command(server: Server) -> None:
    """Coordinate a run.

    Distributes the global model, collects what clients trained, aggregates it, and repeats.
    """
    from edgefed.cli.output import print_note

    def on_ready(url: str) -> None:
        print_note(f"watch the run in a browser: {url.partition('#')[0]}/", to_copy=True)
        state = shlex.quote(str(server.state))
        if server.invite_only:
            print_note(f"serving {url}; make join links with: edgefed invite --state {state}", to_copy=True)
            if not server.token:
                print_note(f"see the run with: edgefed status {shlex.quote(url)} --token @{state}/token", to_copy=True)
            return
        print_note(f"clients join with: edgefed join {shlex.quote(url)} {_flags_to_join(server)}", to_copy=True)

    server.serve(on_ready, on_message=print_note)


def _flags_to_join(server: Server) -> str:
    from edgefed.methods.fedmoe import extractor_task
    from edgefed.methods.registry import is_personal

    run = server.run_config
    token = " --token @FILE" if server.token else ""
    if run is not None and is_personal(run.method):
        return f"--task {extractor_task(run.model)} --data DATA --model MODEL{token}"
    custom = f" --method {server.method}" if isinstance(server.method, str) and ":" in server.method else ""
    return f"--data FILE{custom}{token}"
