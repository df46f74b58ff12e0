"""Clients of the local Hub under failures, and in their own processes with their own environment."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from hub_server import HubServer, run_client


REPO = "tester/model"


# Failures


def test_busy_then_well(hub, api, put, client_waits_little):
    hub.fail_next(2, status=503, match="POST .*preupload")
    hub.fail_next(1, status=500, match="PUT /lfs")
    put("a.safetensors", b"weights")
    assert hub.files(REPO) == {"a.safetensors": b"weights"}
    assert sum("preupload" in request for request in hub.requests) == 3

    hub.fail_next(1, status=503, match="POST .*/commit/")  # the client does not repeat a commit
    with pytest.raises(HfHubHTTPError, match="503"):
        put("b.txt", b"b")
    put("b.txt", b"b")
    assert set(hub.files(REPO)) == {"a.safetensors", "b.txt"}


def test_busy_until_healed(hub, api, put, tmp_path, client_waits_little):
    put("a.txt", b"a")
    options = {"cache_dir": tmp_path, "endpoint": hub.endpoint, "token": hub.token}
    hub.fail_next(1000)
    with pytest.raises(HfHubHTTPError, match="503"):
        put("a.txt", b"b")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "a.txt", **options)
    hub.heal()
    assert Path(hf_hub_download(REPO, "a.txt", **options)).read_bytes() == b"a"


def test_cut_upload(hub, api, put, tmp_path, client_waits_little):
    content = os.urandom(3 * 2**20)
    (tmp_path / "a.bin").write_bytes(content)
    hub.cut_connection(match="PUT /lfs", after_bytes=2**20)
    api.upload_file(path_or_fileobj=tmp_path / "a.bin", path_in_repo="a.bin", repo_id=REPO)
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    assert hub.files(REPO) == {"a.bin": content}

    hub.cut_connection(match="POST .*/commit/", n=1)
    with pytest.raises(Exception, match="(?i)disconnect|reset|broken"):
        put("b.txt", b"b")
    assert set(hub.files(REPO)) == {"a.bin"}
    put("b.txt", b"b")
    assert set(hub.files(REPO)) == {"a.bin", "b.txt"}


def test_cut_download_is_continued(hub, api, put, tmp_path, client_waits_little):
    content = os.urandom(3 * 2**20)
    put("a.bin", content)
    hub.cut_connection(match="GET .*/resolve/", after_bytes=2**20)
    path = hf_hub_download(REPO, "a.bin", cache_dir=tmp_path, endpoint=hub.endpoint, token=hub.token)
    assert Path(path).read_bytes() == content
    assert sum("resolve" in request and request.startswith("GET") for request in hub.requests) == 2


def test_chunked_upload(hub):
    """Clients that send a stream do not know its length."""
    pieces = [os.urandom(100_000) for _ in range(5)]
    sha256 = hashlib.sha256(b"".join(pieces)).hexdigest()
    for _ in range(2):  # on one connection: the end of the body must be found
        assert get_session().put(f"{hub.endpoint}/lfs/{sha256}", content=iter(pieces)).status_code == 200
    assert hub.lfs.uploads == {sha256: b"".join(pieces)}
    assert get_session().put(f"{hub.endpoint}/lfs/{sha256}", content=b"other").status_code == 400


def test_nothing_answers_after_the_end(tmp_path, hub):
    with HubServer(tmp_path / "other") as other:
        api = HfApi(endpoint=other.endpoint, token=other.token)
        api.create_repo(REPO)
    with pytest.raises(Exception, match="(?i)refused|disconnect|reset"):
        api.model_info(REPO)


# Clients in their own process


ROUND_TRIP = """
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
api.create_repo("tester/model", exist_ok=True)
content = bytes(range(256)) * 4096
api.upload_file(path_or_fileobj=content, path_in_repo="one.safetensors", repo_id="tester/model")
folder = Path("folder")
folder.mkdir()
Path(folder, "two.bin").write_bytes(content[::-1])
Path(folder, "config.json").write_text("{}")
api.upload_folder(folder_path=folder, repo_id="tester/model")
api.upload_folder(folder_path=folder, repo_id="tester/model")  # unchanged: no commit
pull = api.upload_folder(folder_path=folder, path_in_repo="sub", repo_id="tester/model", create_pr=True)
assert pull.pr_revision == "refs/pr/1", pull
assert Path(hf_hub_download("tester/model", "one.safetensors")).read_bytes() == content
assert Path(snapshot_download("tester/model"), "two.bin").read_bytes() == content[::-1]
assert Path(snapshot_download("tester/model", revision="refs/pr/1"), "sub", "two.bin").exists()
"""


@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_round_trip(hub, transfer):
    if transfer == "xet":
        pytest.importorskip("hf_xet")
    run_client(ROUND_TRIP, hub, HF_HUB_DISABLE_XET="0" if transfer == "xet" else "1")
    content = bytes(range(256)) * 4096
    assert hub.files(REPO) == {"one.safetensors": content, "two.bin": content[::-1], "config.json": b"{}"}
    assert set(hub.files(REPO, "refs/pr/1")) == {*hub.files(REPO), "sub/two.bin", "sub/config.json"}
    assert len(hub.commits(REPO)) == 3
    assert any("PUT /lfs" in request for request in hub.requests) == (transfer == "lfs")
    assert any("xet-write-token" in request for request in hub.requests) == (transfer == "xet")


def test_xet_survives_failures_and_serves_other_clients(hub, api, tmp_path):
    pytest.importorskip("hf_xet")
    hub.fail_next(1, match="preupload")
    hub.fail_next(1, match="xet-write-token")
    hub.cut_connection(match="POST .*/commit/")
    run_client(
        """
from pathlib import Path
from huggingface_hub import HfApi
folder = Path("folder")
folder.mkdir()
Path(folder, "a.safetensors").write_bytes(bytes(100_000))
HfApi().upload_folder(folder_path=folder, repo_id="tester/model")
""",
        hub,
    )
    assert hub.files(REPO) == {"a.safetensors": bytes(100_000)}
    assert [file.xet_hash for file in api.get_paths_info(REPO, "a.safetensors")] != [None]
    path = hf_hub_download(REPO, "a.safetensors", cache_dir=tmp_path, endpoint=hub.endpoint, token=hub.token)
    assert Path(path).read_bytes() == bytes(100_000)  # without Xet, from what came by Xet


def test_transformers_and_a_client_without_token(hub):
    run_client(
        """
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(config).push_to_hub("tester/model")
AutoModelForCausalLM.from_pretrained("tester/model")
""",
        hub,
    )
    assert {"config.json", "model.safetensors"} < set(hub.files(REPO))
    run_client(
        """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
hf_hub_download("tester/model", "config.json")
try:
    HfApi().create_repo("tester/other")
except HfHubHTTPError as error:
    assert error.response.status_code == 401
else:
    raise AssertionError("created without a token")
""",
        hub,
        HF_TOKEN="",
        HF_HOME=str(hub.directory / "anonymous"),
    )


def test_server_as_a_process(tmp_path):
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-m", "hub_server", "--port", "0", "--directory", str(tmp_path)]
    with subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, text=True) as server:
        try:
            endpoint, token = server.stdout.readline().split()
            code = "from huggingface_hub import HfApi; import json; print(json.dumps(HfApi().whoami()))"
            env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
            whoami = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        finally:  # leaving the block waits for the server to end
            server.terminate()
    assert json.loads(whoami.stdout)["name"] == "tester"
    assert server.returncode == 0
