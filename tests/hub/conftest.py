"""A local Hub and clients of it, small sets of P, and a run for model cards: shared by the tests of this folder."""

from types import SimpleNamespace

import pytest
import torch
from card_reading import LOG
from huggingface_hub import HfApi
from transformers import TrainerState, TrainingArguments

from hf_osd import create_osd_optimizer
from hf_osd.hub.card.model_card import CardFacts
from hub_server import HubServer
from reference.tiny_models import tiny_llama


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


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The client that transformers pushes with in this process; it speaks to the local server, as all others do."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    monkeypatch.setattr("transformers.utils.hub._hf_api", client)
    return client


@pytest.fixture(params=["one file", "sharded"])
def max_shard_size(request):
    """Of sets of P."""
    return {"one file": "5GB", "sharded": 100}[request.param]


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def run(llama, tmp_path):
    """Facts of three steps of a tiny LLaMA, and what they were read from."""

    def make(optim="osd_adamw", *, args=None, model=None, log=LOG, facts=None, **options):
        model = llama if model is None else model
        optimizer = create_osd_optimizer(model, optim, **{"rank": 4, **options})
        ids = torch.randint(0, 32, (2, 8))
        for _ in range(3):
            llama(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        args = args or TrainingArguments(str(tmp_path / "out"), optim=optim, report_to="none", use_cpu=True)
        state = TrainerState(global_step=1234, log_history=log)
        found = CardFacts.from_run(optimizer, args, state, model, **{"repo_id": "tester/model", **(facts or {})})
        return SimpleNamespace(facts=found, optimizer=optimizer, args=args, state=state, model=model)

    return make
