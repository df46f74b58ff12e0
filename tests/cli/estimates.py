"""`hf-osd estimate` as the tests call it."""

import json

import pytest

from hf_osd.cli.main import main


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 200, "max_position_embeddings": 128}


def estimate(capsys, *words: str) -> str:
    main(["estimate", *words])
    return capsys.readouterr().out


def report_of(capsys, *words: str) -> dict:
    return json.loads(estimate(capsys, *words, "--json"))


def row_of(report: dict, method: str, checkpointing: bool = False) -> dict:
    (row,) = (r for r in report["rows"] if r["method"] == method and r["gradient_checkpointing"] == checkpointing)
    return row


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *words])
    assert not capsys.readouterr().out
    message = str(caught.value)
    assert message.startswith("hf-osd estimate: ") and "\n" not in message
    return message
