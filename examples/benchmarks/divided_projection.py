"""P divided among processes against P whole on each: time of a step, bytes and calls of exchange, memory.

The matrices of a model, sharded as FSDP2 shards them (DTensors, `Shard(0)`), on gloo processes of this machine. Two
optimizers step the same weights in turns, one with `divide_projection=True` and one with `False`. What a process
sends is counted from the calls of torch.distributed, as rings do it: of b bytes a gather or reduce-scatter sends
(N - 1) / N b and an all-reduce twice that. Writes results/<device>/divided_projection.json and .md.

With `source="activations"` P is gathered in the forward pass, too: there two copies of the model, under `fully_shard`,
make training steps of 2 x 128 tokens in turns, of which all is counted and timed, what FSDP2 gathers of weights
included. Writes divided_projection_activations.json and .md.

    python examples/benchmarks/divided_projection.py                             # LLaMA 60M, rank 128, two processes
    python examples/benchmarks/divided_projection.py --source activations --rounds 7
    python examples/benchmarks/divided_projection.py --processes 1 2 4 --rounds 5
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from environment import describe, named, results_folder, save
from shapes import block_shapes, config_file, sizes
from stopwatch import in_turn


class Exchanged(TorchDispatchMode):
    """Counts calls of torch.distributed, and the bytes that this process sends in them.

    Attributes:
        calls (`int`): Collectives.
        sent (`float`): Bytes.
    """

    def __init__(self, processes: int):
        super().__init__()
        self.calls, self.sent, self.share = 0, 0.0, (processes - 1) / processes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        name = func.overloadpacket._qualified_op_name
        if name.startswith("c10d::"):
            self.calls += 1
            kind = name.removeprefix("c10d::")
            given = {"_allgather_base_": args[0], "_reduce_scatter_base_": args[1]}.get(kind, args[0])
            whole = sum(X.nbytes for X in (given if isinstance(given, (list, tuple)) else [given]))
            self.sent += self.share * whole * (2 if kind == "allreduce_" else 1)
        return func(*args, **(kwargs or {}))


def sharded_matrices(model: str) -> list[nn.Parameter]:
    """The projected weights of all blocks, as `fully_shard` divides them, with gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    params = []
    for _ in range(sizes(model)[2]):
        for shape in block_shapes(model):
            params.append(nn.Parameter(distribute_tensor(torch.randn(shape) * 0.02, mesh, [Shard(0)])))
            params[-1].grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
    return params


def state_bytes_of(optimizer: torch.optim.Optimizer, params: Collection[torch.Tensor] | None = None) -> dict[str, int]:
    """Bytes that this process holds of P, of P's moments and of R's, of these parameters or all."""
    found = dict.fromkeys(("projection", "projection_moments", "moments"), 0)
    for p, state in optimizer.state.items():
        for name, value in state.items() if params is None or p in params else ():
            kind = name if name == "projection" else f"{'projection_' * name.startswith('projection_')}moments"
            own = value.to_local() if hasattr(value, "to_local") else value
            found[kind] += own.nbytes if own.ndim else 0  # no counters
    return found


def measure(params: list[nn.Parameter], rank: int, rounds: int, lr: float = 1e-3) -> list[dict[str, Any]]:
    """One row for each way; every process calls this."""
    from hf_osd import OSD

    processes, ways = dist.get_world_size(), {"divided": True, "whole": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers = {
            way: OSD([{"params": params, "rank": rank}], lr=lr, divide_projection=divide)
            for way, divide in ways.items()
        }
    rows = []
    for way, optimizer in optimizers.items():
        optimizer.step()  # P starts
        optimizer.step()
        with Exchanged(processes) as exchanged:
            optimizer.step()
        counted = {"calls": exchanged.calls, "sent_bytes": round(exchanged.sent)}
        rows.append({"processes": processes, "way": way, "rank": rank, **counted, **state_bytes_of(optimizer)})
    steps = {way: optimizer.step for way, optimizer in optimizers.items()}
    times = in_turn(steps, rounds, torch.device("cpu"), prepare=dist.barrier) if rounds else {}
    for row in rows:
        if rounds:
            row["step_ms"] = round(1e3 * statistics.median(times[row["way"]]), 2)
    return rows


def sharded_model(model: str) -> nn.Module:
    """The whole model, under FSDP2 by blocks."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_file(model).read_text())))
    for block in found.model.layers:
        fully_shard(block)
    return fully_shard(found)


def measure_training(model: str, rank: int, rounds: int) -> list[dict[str, Any]]:
    """As `measure`, of training steps from activations."""
    from hf_osd import create_osd_optimizer

    processes, steps, rows = dist.get_world_size(), {}, []
    for way, divide in (("divided", True), ("whole", False)):
        trained = sharded_model(model)
        optimizer = create_osd_optimizer(trained, rank=rank, source="activations", divide_projection=divide)

        def step(trained: nn.Module = trained, optimizer: torch.optim.Optimizer = optimizer) -> None:
            ids = torch.randint(0, trained.config.vocab_size, (2, 128))
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()
        with Exchanged(processes) as exchanged:
            step()
        counted = {"calls": exchanged.calls, "sent_bytes": round(exchanged.sent)}
        projected = {p for group in optimizer.trained_groups if group["rank"] for p in group["params"]}
        sizes = state_bytes_of(optimizer, projected)
        rows.append({"processes": processes, "way": way, "rank": rank, **counted, **sizes})
        steps[way] = step
    times = in_turn(steps, rounds, torch.device("cpu"), prepare=dist.barrier) if rounds else {}
    for row in rows if rounds else ():
        row["step_ms"] = round(1e3 * statistics.median(times[row["way"]]), 2)
    return rows


def work(index: int, processes: int, store: str, source: str, model: str, rank: int, rounds: int, out: str) -> None:
    """One of the processes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=index, world_size=processes)
    if source == "activations":
        rows = measure_training(model, rank, rounds)
    else:
        rows = measure(sharded_matrices(model), rank, rounds)
    if index == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = ["processes", "P", "step", "calls", "sent by each", "P", "its moments", "R's moments"]
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join(["---:", "---", *["---:"] * 6]) + " |"]
    for row in rows:
        megabytes = [
            f"{row[key] / 1e6:,.2f} MB" for key in ("sent_bytes", "projection", "projection_moments", "moments")
        ]
        time = f"{row['step_ms']:.1f} ms" if "step_ms" in row else "-"
        cells = [str(row["processes"]), row["way"], time, str(row["calls"]), *megabytes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes the table."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="60m", help="of llama_configs/ (default: 60m)")
    parser.add_argument("--source", choices=("gradients", "activations"), default="gradients")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--processes", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each (default: 15)")
    parser.add_argument("--output", type=Path, help="folder (default: results/<device>/)")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            asked = (arguments.source, arguments.model, arguments.rank, arguments.rounds)
            given = (f"{folder}/store", *asked, f"{folder}/rows.json")
            mp.start_processes(work, (processes, *given), nprocs=processes, start_method="spawn")
            rows += json.loads(Path(given[-1]).read_text())
    result = {"environment": describe("cpu"), "model": arguments.model, "source": arguments.source, "rows": rows}
    name = "divided_projection" + "_activations" * (arguments.source == "activations")
    save((arguments.output or results_folder("cpu")) / name, result, render)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
