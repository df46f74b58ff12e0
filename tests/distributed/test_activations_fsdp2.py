"""`source="activations"` where FSDP2 divides the weights: as one process on the global batch, no gradients of W."""

import activations_exchange as exchange
import activations_training as training
import processes
import pytest


pytestmark = pytest.mark.distributed

TWO = [training.dense, training.clipped, training.accumulated, training.checkpointed, training.accelerate_order]
TWO += [training.evaluated, training.in_bfloat16, training.eight_bit, exchange.no_gradient_of_w]
TWO += [exchange.used_otherwise_too, exchange.called_on_some_processes, exchange.bytes_on_the_wire]
TWO += [exchange.what_does_not_fit, exchange.refused, exchange.tensor_parallel, training.resumed]
TWO += [training.loaded_by_the_first_process]
FOUR = [training.hsdp, training.resumed]
CASES = [(2, scenario.__name__) for scenario in TWO] + [(4, scenario.__name__) for scenario in FOUR]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@pytest.fixture(scope="module")
def results(folder):
    two, four = processes.run(2, TWO, folder), processes.run(4, FOUR, folder)
    return {(2, name): text for name, text in two.items()} | {(4, name): text for name, text in four.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]} on {case[0]}")
def test_processes(results, case):
    assert not results[case], results[case]


def test_one_process_goes_on(results, folder):
    training.resumed(0, 1, folder)
