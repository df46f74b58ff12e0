"""`source="activations"` where FSDP2 divides the weights: as one process on the global batch, no gradients of W.

On four processes in test_fsdp2_meshes.py; saved, and resumed on other numbers of processes, in
test_fsdp2_checkpoints.py; in a stock Trainer in test_fsdp2_trainer.py.
"""

import activations_divided
import activations_exchange as exchange
import activations_gathers as gathers
import activations_training as training
import processes
import pytest


pytestmark = pytest.mark.distributed

SCENARIOS = [training.dense, training.clipped, training.accumulated, training.checkpointed, training.accelerate_order]
SCENARIOS += [training.evaluated, training.in_bfloat16, training.eight_bit, exchange.no_gradient_of_w]
SCENARIOS += [exchange.used_otherwise_too, exchange.called_on_some_processes, exchange.bytes_on_the_wire]
SCENARIOS += [exchange.what_does_not_fit, exchange.refused, exchange.tensor_parallel]
SCENARIOS += [activations_divided.shared_and_tied, activations_divided.whole_by_option]
SCENARIOS += [gathers.where_autocast_is_off, gathers.freed_and_gathered_once, gathers.recomputed_on_some_processes]
SCENARIOS += [activations_divided.saved_and_given, training.loaded_by_the_first_process]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(2, SCENARIOS, tmp_path_factory.mktemp("activations"))


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(results, scenario: str):
    assert not results[scenario], results[scenario]
