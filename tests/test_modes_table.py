"""What works with what: docs/distributed.md's table, and which tests show each cell. Run it to print the table."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "distributed.md").read_text(encoding="utf-8")

COLUMNS = ("accumulation", "clipping", "DDP", "FSDP2", "8-bit", "resume", "residual", "two-sided", "`power`")
DDP, FSDP2, MESHES = "distributed/test_ddp.py", "distributed/test_fsdp2.py", "distributed/test_fsdp2_meshes.py"
ONE, REFUSED = f"{DDP}::test_two_processes_train_as_one", f"{MESHES}::test_scenario[refused]"
TRAINER = f"{DDP}::test_trainer_on_two_processes_is_trainer_on_one"
LAYERS, STOCK = "layers", "trainer/test_activations.py"
INT8, INT8_SAVED = f"{LAYERS}/test_int8_training.py", f"{LAYERS}/test_int8_saved.py"
BOTH = "optim/test_layerwise_layers.py"
SAVED = "distributed/test_fsdp2_checkpoints.py"
FORWARD, FORWARD_REFUSES = "subzero/test_trainer.py", "subzero/test_trainer_refusals.py"
LAYERWISE = "trainer/test_layerwise_trainer.py"
SHARDED, HOOKS = "distributed/test_fsdp2_family.py", "optim/test_layerwise_family.py"
ALIKE, INEXACT = (
    f"{HOOKS}::test_steps_are_bit_for_bit_the_ordinary_modes",
    f"{HOOKS}::test_what_would_not_be_exact_is_refused",
)

# row -> for each column the text and the tests that show it
TABLE: dict[str, list[tuple[str, list[str]]]] = {
    "ordinary": [
        ("yes", [f"{LAYERWISE}::test_accumulation_equals_the_ordinary_modes", f"{ONE}[accumulated]"]),
        ("global", [f"{TRAINER}[trainer_plain]", f"{LAYERWISE}::test_the_true_gradient_norm_is_logged"]),
        ("yes", [f"{ONE}[plain]", f"{ONE}[random_start]", f"{DDP}::test_accelerate_is_a_loop_in_ddp"]),
        ("yes", [f"{FSDP2}::test_two_processes[adamw]"]),
        ("yes", ["trainer/test_resume.py::test_trainer_resumes_exactly", f"{DDP}::test_moments_are_in_8_bits"]),
        ("exact", ["trainer/test_resume.py::test_trainer_resumes_exactly", f"{DDP}::test_resume_is_exact"]),
        ("yes", [f"{ONE}[scaled]", f"{ONE}[sign]"]),
        ("yes", [f"{ONE}[two_sided]"]),
        ("yes", [f"{ONE}[power]"]),
    ],
    "`layerwise`": [
        (
            "in the subspace ¹",
            [
                f"{LAYERWISE}::test_accumulation_equals_the_ordinary_modes",
                "optim/test_layerwise.py::test_accumulation_makes_p_from_the_first_micro_batch_and_moves_it_by_the_mean",
            ],
        ),
        ("per parameter, or by the step before", ["optim/test_layerwise.py::test_clipping_against_torch"]),
        ("refused", [f"{DDP}::test_layerwise_is_refused_and_told_what_takes_its_place"]),
        ("refused", [REFUSED]),
        ("yes", [f"{LAYERWISE}::test_fifty_steps_are_bit_for_bit_the_ordinary_modes"]),
        (
            "exact",
            [
                f"{LAYERWISE}::test_resume_is_exact_with_every_clipping",
                "optim/test_distributed_checkpoint.py::test_the_norm_that_previous_norm_clips_by_is_saved",
            ],
        ),
        (
            "without accumulation",
            [
                f"{ALIKE}[scaled]",
                f"{ALIKE}[sign]",
                f"{HOOKS}::test_clipping_against_torch[scaled]",
                f"{LAYERWISE}::test_the_family_is_bit_for_bit_the_ordinary_modes",
                f"{LAYERWISE}::test_resume_is_exact_with_a_residual_and_clipping",
                INEXACT,
            ],
        ),
        ("without accumulation", [f"{ALIKE}[two_sided]", INEXACT]),
        (
            "without accumulation or clipping",
            [f"{ALIKE}[power]", INEXACT, f"{HOOKS}::test_power_is_refused_with_clipping_and_works_without_momentum"],
        ),
    ],
    "`source=activations`": [
        (
            "yes",
            [f"{LAYERS}/test_against_twin.py::test_a_hundred_steps", f"{STOCK}::test_accumulation_is_one_large_batch"],
        ),
        (
            "global, of R",
            [f"{TRAINER}[trainer_activations]", f"{LAYERS}/test_model_stays.py::test_fp16_scaler_with_clipping"],
        ),
        ("yes", ["distributed/test_activations_ddp.py::test_two_processes"]),
        (
            "yes",
            [
                "distributed/test_activations_fsdp2.py::test_two_processes",
                "distributed/test_fsdp2_trainer.py::test_two_processes_train_what_one_trains",
                "rso/test_rso_ddp.py::test_two_processes_train_as_one",
            ],
        ),
        ("yes", [f"{STOCK}::test_resume_is_exact"]),
        ("exact", [f"{STOCK}::test_resume_is_exact", f"{LAYERS}/test_model_stays.py::test_resume_is_exact"]),
        (
            "signs",
            [
                f"{LAYERS}/test_against_twin.py::test_a_hundred_steps",
                f"{LAYERS}/test_sharing.py::test_what_needs_a_gradient_is_refused",
                "distributed/test_activations_ddp.py::test_two_processes",
                "distributed/test_activations_fsdp2.py::test_two_processes",
            ],
        ),
        ("refused", [f"{LAYERS}/test_sharing.py::test_what_needs_a_gradient_is_refused"]),
        ("yes", [f"{LAYERS}/test_model_stays.py::test_resume_is_exact"]),
    ],
    "`layerwise`, `source=activations`": [
        ("yes", [f"{BOTH}::test_micro_batches_add_up_r"]),
        ("per parameter, or by the step before, of R", [f"{BOTH}::test_clipping_is_that_of_r"]),
        ("refused", [f"{DDP}::test_layerwise_is_refused_and_told_what_takes_its_place"]),
        ("refused", ["distributed/test_activations_fsdp2.py::test_two_processes"]),
        ("yes", [f"{STOCK}::test_layerwise_is_the_ordinary_mode_and_resumes"]),
        ("exact", [f"{STOCK}::test_layerwise_is_the_ordinary_mode_and_resumes", f"{BOTH}::test_resume_is_exact"]),
        (
            "signs",
            [f"{BOTH}::test_steps_are_the_ordinary_modes", f"{BOTH}::test_micro_batches_add_up_r"],
        ),
        ("refused", [f"{LAYERS}/test_sharing.py::test_what_needs_a_gradient_is_refused"]),
        (
            "without clipping",
            [f"{BOTH}::test_steps_are_the_ordinary_modes", f"{BOTH}::test_power_with_clipping_is_refused"],
        ),
    ],
    "`weight_dtype=int8`": [
        ("yes", [f"{INT8_SAVED}::test_training_goes_on_exactly_from_what_is_saved"]),
        ("global, of R", [f"{STOCK}::test_resume_is_exact"]),
        ("yes", ["distributed/test_activations_ddp.py::test_two_processes[int8]"]),
        ("refused", [f"{INT8}::test_sharded_weights_refuse_it"]),
        ("yes", [f"{STOCK}::test_resume_is_exact"]),
        (
            "exact",
            [f"{STOCK}::test_resume_is_exact", f"{INT8_SAVED}::test_training_goes_on_exactly_from_what_is_saved"],
        ),
        ("signs", [f"{INT8}::test_a_step_is_that_of_a_float_weight_up_to_one_rounding"]),
        ("refused", [f"{LAYERS}/test_sharing.py::test_what_needs_a_gradient_is_refused"]),
        ("yes", [f"{INT8_SAVED}::test_training_goes_on_exactly_from_what_is_saved"]),
    ],
    "FSDP2": [
        ("yes", [f"{FSDP2}::test_two_processes[accumulated]"]),
        ("global", [f"{FSDP2}::test_two_processes[clipped]"]),
        ("as HSDP", [f"{MESHES}::test_scenario[hsdp]"]),
        (
            "yes",
            [
                f"{FSDP2}::test_two_processes[adamw]",
                "distributed/test_fsdp2_trainer.py::test_two_processes_train_what_one_trains",
            ],
        ),
        ("rank a multiple of 64 ²", [f"{FSDP2}::test_two_processes[eight_bit]"]),
        (
            "exact; resharded",
            [
                f"{SAVED}::test_two_processes[load_sharded]",
                f"{SAVED}::test_other_numbers_of_processes",
                "distributed/test_load_time.py::test_four_processes_go_on",
            ],
        ),
        ("yes", [f"{SHARDED}::test_two_processes[{name}]" for name in ("scaled_column", "scaled_svd", "sign")]),
        ("refused", [f"{SHARDED}::test_scenario[two_sided_is_refused]"]),
        ("yes", [f"{SHARDED}::test_two_processes[power]"]),
    ],
    "`subzero`": [
        ("yes", [f"{FORWARD}::test_accumulation_is_one_large_batch_and_a_schedule_is_followed"]),
        ("of rho", [f"{FORWARD}::test_rho_is_what_is_clipped_and_logged"]),
        ("yes", [f"{DDP}::test_subzero_exchanges_rho_alone"]),
        ("refused", [f"{FORWARD_REFUSES}::test_engines_that_divide_the_weights_are_refused"]),
        ("no moments", ["subzero/test_log.py::test_a_state_goes_on_bit_for_bit_and_other_options_are_refused"]),
        ("exact", ["subzero/test_subzero_resume.py::test_resume_is_exact"]),
        *[("refused", [f"{FORWARD_REFUSES}::test_what_would_not_work_is_refused_at_once"])] * 3,
    ],
}
CELLS = [(row, column, *cell) for row, cells in TABLE.items() for column, cell in zip(COLUMNS, cells, strict=True)]


def table() -> str:
    """The table in Markdown."""
    rows = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[name, *(text for text, _ in cells)] for name, cells in TABLE.items()]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def test_the_table_is_on_the_page():
    assert table() in PAGE


@pytest.mark.parametrize(("row", "column", "text", "ids"), CELLS, ids=[f"{row}-{column}" for row, column, *_ in CELLS])
def test_every_cell_has_tests_that_exist(row: str, column: str, text: str, ids: list[str]):
    assert text and ids
    for test in ids:
        path, name, case = re.fullmatch(r"([\w/]+\.py)::(\w+)(?:\[(\w+)\])?", test).groups()
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        if case is not None:  # a scenario of the file, or a training that torchrun's program makes
            program = ast.parse((TESTS / "distributed" / "ddp_training.py").read_text(encoding="utf-8"))
            nodes = [*ast.walk(tree), *ast.walk(program)]
            names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            names |= {node.value for node in nodes if isinstance(node, ast.Constant)}
            assert case in names, test


if __name__ == "__main__":
    print(table())
