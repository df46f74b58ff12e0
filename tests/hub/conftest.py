"""A local Hub for the tests of this folder, and a client of it in this process."""

import pytest
from huggingface_hub import HfApi

from hub_server import HubServer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    A fresh Hub, which clients in this process may reach: they read HF_HUB_OFFLINE=1 at import. In this process they
    upload by LFS; those by Xet, whose cache is shared, run in their own process (`hub_server.run_client`).
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def api(hub):
    """A client of the user `tester`, who has the repository tester/model."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("tester/model")
    return api


@pytest.fixture
def put(api):
    """Commits one file to tester/model; returns the id of the commit."""

    def put(path: str, content: bytes, **options: str) -> str:
        return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="tester/model", **options).oid

    return put


@pytest.fixture
def client_waits_little(monkeypatch):
    """The client waits a second before it tries again; the tests need not. Holds for every sleep of this process."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
