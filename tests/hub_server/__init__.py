"""
A small Hugging Face Hub on 127.0.0.1, for tests:

    with HubServer(tmp_path) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)

Without: discussions and merging of pull requests, gated repositories, organizations, search and listing of
repositories, git clone, multipart LFS, copies of large files between repositories. hf_xet lets only one process at a
time open a `local://` storage: run clients that use Xet one after the other, and ask `HubServer.files` after them.
"""

from . import routes_files, routes_repos  # noqa: F401 - they fill the table of routes
from .client import run_client
from .server import HubServer


__all__ = ["HubServer", "run_client"]
