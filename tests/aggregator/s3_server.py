"""moto's S3 server, which in addition refuses expired URLs as S3 does: ``python s3_server.py READY_FILE REQUEST_LOG``.

Runs in an environment with ``moto[server]`` (`find_python`). Each request becomes a line of the log: method, status,
path, and the names of edgefed's headers in it, which never belong there.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

START_S = 40.0
EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


def find_python() -> str | None:
    """This Python if it has moto, or the one that EDGEFED_TEST_MOTO names."""
    return sys.executable if importlib.util.find_spec("moto") else os.environ.get("EDGEFED_TEST_MOTO")


class S3Server:
    """A server process with one bucket, ``runs``."""

    def __init__(self, folder: Path):
        ready, self.log = folder / "s3-ready", folder / "s3-requests.log"
        python = find_python()
        assert python is not None, "no Python with moto"
        self.process = subprocess.Popen(
            [python, __file__, str(ready), str(self.log)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START_S
        while not ready.exists():
            assert self.process.poll() is None, "moto did not start"
            assert time.monotonic() < until, "moto did not start in time"
            time.sleep(0.05)
        self.url = ready.read_text()
        self.environment = {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }  # fmt: skip

    def requests(self, method: str, part: str = "") -> list[tuple[int, str, str]]:
        """(status, path, edgefed's headers) of the requests so far."""
        lines = [line.split(" ", 3) for line in self.log.read_text().splitlines()]
        return [(int(status), path, more) for verb, status, path, more in lines if verb == method and part in path]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


def expired(query: str) -> bool:
    values = dict(urllib.parse.parse_qsl(query))
    if "X-Amz-Expires" not in values:
        return False
    made = datetime.datetime.strptime(values["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc)
    age = datetime.datetime.now(datetime.timezone.utc) - made
    return age.total_seconds() > float(values["X-Amz-Expires"])


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    s3 = DomainDispatcherApplication(create_backend_app)
    log = open(sys.argv[2], "a", buffering=1)  # noqa: SIM115  until the process ends

    def application(environ, start_response):
        found = " ".join(name for name in environ if "EDGEFED" in name or name == "HTTP_AUTHORIZATION")

        def started(status, headers, *more):
            log.write(f"{environ['REQUEST_METHOD']} {status.split()[0]} {environ['PATH_INFO']} {found}\n")
            return start_response(status, headers, *more)

        if expired(environ.get("QUERY_STRING", "")):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            started("403 Forbidden", [("content-type", "application/xml"), ("content-length", str(len(EXPIRED)))])
            return [EXPIRED]
        return s3(environ, started)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    import urllib.request

    def ready() -> None:
        url = f"http://127.0.0.1:{server.server_port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT")).close()
        part = Path(sys.argv[1] + ".part")
        part.write_text(url)
        part.rename(sys.argv[1])

    import threading

    threading.Thread(target=ready, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
