"""`python -m hub_server --port 0 --directory DIR` (from `tests/`) prints its endpoint and token, then serves."""

import argparse
import signal
import sys
import threading
from pathlib import Path

from .server import HubServer


parser = argparse.ArgumentParser(prog="python -m hub_server", description=__doc__)
parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
parser.add_argument("--directory", type=Path, required=True, help="where the Xet storage lies")
arguments = parser.parse_args()

# Not only Ctrl+C: a shell starts background jobs with SIGINT ignored.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with HubServer(arguments.directory, arguments.port) as hub:
    print(hub.endpoint, hub.token, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
