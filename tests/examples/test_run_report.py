import json
import math
from types import SimpleNamespace

import pytest
import torch

from loss_plot import optimizer_named, save_loss_plot
from run_report import (
    PerplexityCallback,
    adamw_state_bytes,
    optimizer_state_bytes,
    perplexity,
    tokens_seen,
)


def test_perplexity_is_exp_of_the_loss():
    assert perplexity(2.5) == math.exp(2.5)
    assert perplexity(1e4) == math.inf


def test_perplexity_is_logged_with_every_evaluation():
    state = SimpleNamespace(log_history=[{"loss": 2.0}, {"eval_loss": 1.0, "step": 3}])
    logs = {"eval_loss": 1.0}
    PerplexityCallback().on_log(None, state, None, logs)
    assert logs["eval_perplexity"] == state.log_history[-1]["eval_perplexity"] == math.e
    logs = {"loss": 1.0}
    PerplexityCallback().on_log(None, state, None, logs)
    assert logs == {"loss": 1.0}


def test_state_bytes_of_adamw_are_two_moments_and_a_step():
    model = torch.nn.Linear(10, 6)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert adamw_state_bytes(model) == 2 * 60 * 4
    assert optimizer_state_bytes(optimizer) == 2 * 60 * 4 + 4  # a float32 step for the only trainable parameter


def test_state_bytes_of_wrapped_nested_shared_and_foreign_state():
    first, second = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([first, second])
    table = torch.zeros(256)
    projector = SimpleNamespace(ortho_matrix=[torch.zeros(3, 2), torch.zeros(2, 5, dtype=torch.bfloat16)])
    optimizer.state[first] = {"step": 3, "codes": torch.zeros(4, dtype=torch.uint8), "table": table}
    optimizer.state[second] = {"inner": {"moment": torch.zeros(7)}, "projector": projector, "table": table}
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert optimizer_state_bytes(wrapped) == 4 + 256 * 4 + 7 * 4 + 6 * 4 + 10 * 2


@pytest.mark.parametrize(
    ("step", "blocks", "expected"),
    [
        (3, None, 3 * 8 * 16),
        (3, 100, 3 * 8 * 16),
        (3, 20, 20 * 16),  # an epoch of 8 + 8 + 4 blocks
        (7, 20, (2 * 20 + 8) * 16),
    ],
)
def test_tokens_seen(step, blocks, expected):
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)
    assert tokens_seen(SimpleNamespace(global_step=step), args, 16, blocks) == expected


def test_plot_is_written_for_long_short_and_resumed_histories(tmp_path):
    history = [{"loss": 5 / step, "step": step} for step in range(1, 60)] + [{"eval_loss": 1.0, "step": 59}]
    for entries in (history, history[-1:]):
        save_loss_plot(json.loads(json.dumps(entries)), "title", "subtitle", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "loss.png").unlink()


def test_the_plot_names_what_was_given_to_the_optimizer():
    settings = {"optim": "osd_adamw", "learning_rate": 1e-3, "osd_rank": 8, "osd_source": "activations"}
    assert optimizer_named(settings) == "osd_adamw (rank=8, source=activations)"
    assert (
        optimizer_named({"optim": "galore_adamw", "optim_args": "rank=8,scale=2"}) == "galore_adamw (rank=8,scale=2)"
    )
    assert optimizer_named({"optim": "adamw_torch_fused"}) == "adamw_torch_fused"
