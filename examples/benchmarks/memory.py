"""Memory of a training step by part, what `hf-osd estimate` predicts beside what the allocator was asked for.

Three steps of a LLaMA with random weights for each optimizer of ours and its peers, ordinary and layerwise, without
and with gradient checkpointing. On the CPU allocations are counted by torch.profiler, on a GPU by the caching
allocator. bitsandbytes' kernels decode into temporaries on CPUs and only there: its peak is told without them. With
`source=activations` R counts as a gradient, and A, which lives until the step, among the activations.
With a name, reads its settings from experiments/<name>.json. Writes results/<device>/memory.json (or <name>.json), .md
(a few, measured), _all.md (predicted and measured) and .png.

Needs: the `examples` extra.

    python examples/benchmarks/memory.py --model llama_60m --layers 2 --rank 128    # a look, two minutes
    python examples/benchmarks/memory.py                                            # the committed figures on a CPU
    python examples/benchmarks/memory.py memory_int8                                # int8 weights, in bfloat16
    python examples/benchmarks/memory.py --device cuda --model llama_1b --layers 24 --dtype bf16 --batch 8 --seq 1024
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from allocations import counted
from environment import added, describe, load_experiment, named, results_folder, save
from hf_osd.estimate import DTYPES, Method, Workload, adamw, adamw8bit, galore, lora, osd
from hf_osd.estimate.models import enable_checkpointing
from hf_osd.layers.int8 import Int8Weight, held_bytes
from hf_osd.optim import OPTIM_NAMES
from layerwise_memory import LiveGradients
from whole_models import BASELINE, PEERS, load_config, make_optimizer, parse_name, prepare_model, random_model


ACTIVATIONS = ("osd_adamw:source=activations", "osd_adamw8bit:source=activations")
CHECKPOINTED = (BASELINE, "osd_adamw8bit", "osd_adamw8bit_layerwise", "osd_adamw8bit:source=activations")
OF = {BASELINE: "AdamW's"}
STEPS = 3
RUNS = [*PEERS, *(name for name in OPTIM_NAMES if name.startswith("osd_")), *ACTIVATIONS]
FEW = [*PEERS, "osd_adamw", "osd_adamw8bit", "osd_adamw8bit_layerwise", *ACTIVATIONS]
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "state",
    "projection": "P",
    "activations": "activations",
    "temporaries": "step",
    "peak": "peak",
}
COLORS = {
    "weights": ("weights", "#4c72b0"),
    "state": ("state", "#dd8452"),
    "projection": ("P and its moments", "#f2c79b"),
    "rest": ("gradients, activations, temporaries", "#b0b0b0"),
}


def predict(work: Workload, name: str, rank: int) -> Method:
    """The method that `--runs` names."""
    model = work.model()
    if name.startswith("osd_"):
        optim, options = parse_name(name)
        return osd(model, optim.removesuffix("_layerwise"), rank, options, layerwise=optim.endswith("_layerwise"))
    if name == "lora":
        return lora(work.model("lora"))
    if name == "galore_adamw":
        return galore(model, rank, "all-linear")
    return {"adamw_torch_fused": adamw, "adamw_bnb_8bit": adamw8bit}[name](model)


def measure(config: Any, name: str, checkpointing: bool, settings: argparse.Namespace) -> dict[str, int]:
    """Bytes of each part over `STEPS` steps, and their peak; `settings` has rank, dtype, device, batch and seq."""
    device, tokens = settings.device, (settings.batch, settings.seq)
    if device == "cuda":  # the workspaces of its libraries stay
        (torch.ones(64, 64, device=device, requires_grad=True) @ torch.ones(64, 64, device=device)).sum().backward()
    ids = torch.randint(config.vocab_size, tokens, device=device)
    with counted(device) as (phase, seen):
        with phase("model"):
            model = prepare_model(random_model(config, DTYPES[settings.dtype], device), name, settings.rank)
            if checkpointing:
                enable_checkpointing(model)
        gradients = LiveGradients()
        if "source=activations" not in name:  # which leaves weights to their gradients where a hook waits for them
            gradients.watch(model)
        with make_optimizer(model, name, settings.rank) as optimizer:
            gradients.watch(model)  # of stand-ins, which come with it
            smaller = sum(p.nbytes - held_bytes(p) for p in model.parameters() if isinstance(p, Int8Weight))
            for step in range(STEPS):
                with phase(f"forward {step}"):
                    loss = model(input_ids=ids, labels=ids).loss
                with phase(f"backward {step}"):
                    loss.backward()
                with phase(f"optimizer {step}"):
                    optimizer.step()
                with phase(f"end {step}"):
                    optimizer.zero_grad()
                    del loss
        states = optimizer.state.values()
        projection = sum(v.nbytes for s in states for k, v in s.items() if k.startswith("projection"))
        projection += sum(s["projector"].ortho_matrix.untyped_storage().nbytes() for s in states if "projector" in s)
    last = STEPS - 1
    steps = [seen[f"optimizer {step}"] for step in range(STEPS)]
    decodes = name == "adamw_bnb_8bit" and device == "cpu"
    return {
        "weights": seen["model"].end - seen["model"].start - smaller,
        "gradients": gradients.peak,
        "state": seen[f"end {last}"].end - seen["model"].end + smaller - projection,
        "projection": projection,
        "activations": seen[f"forward {last}"].end - seen[f"forward {last}"].start,
        "temporaries": max(part.peak - part.end for part in steps),
        "peak": max(part.peak for part in seen.values() if not (decodes and part in steps)) - seen["model"].start,
    }


def predicted(work: Workload, name: str, checkpointing: bool, settings: argparse.Namespace) -> dict[str, int]:
    """The same parts from the config alone."""
    method = predict(work, name, settings.rank)
    parts = asdict(work.parts(method, checkpointing, settings.batch))
    parts["activations"] = work.run(method.model, checkpointing, settings.batch).forward  # with what the loss keeps
    return {part: parts[part] for part in PARTS}


def run_all(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each optimizer and mode."""
    config = load_config(settings.model, settings.layers)
    work = Workload(config, DTYPES[settings.dtype], settings.seq, settings.rank)
    rows = []
    for name in settings.runs:
        usual = (False, True) if name in CHECKPOINTED else (False,)
        for checkpointing in (True,) if settings.checkpointing else usual:
            row = {"optim": name, "gradient_checkpointing": checkpointing}
            row["predicted"] = predicted(work, name, checkpointing, settings)
            row["measured"] = measure(config, name, checkpointing, settings)
            if name.endswith("_layerwise"):
                row["measured"]["temporaries"] = None  # they come and go within the backward pass
            rows.append(row)
            print(label(row), row["measured"]["peak"], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: a few, measured; all where AdamW was not asked for, and compared with the first."""
    alike = all(row["gradient_checkpointing"] for row in rows)
    measured = {row["optim"]: row["measured"] for row in rows if alike or not row["gradient_checkpointing"]}
    few = {name: seen for name, seen in measured.items() if name in FEW} if BASELINE in measured else measured
    first = BASELINE if BASELINE in few else next(iter(few))
    lines = [
        f"| MiB | weights | gradients | optimizer | of it P | activations | peak | of {OF.get(first, 'the first')} |",
        "| --- " * 8 + "|",
    ]
    for name, seen in few.items():
        parts = {"optimizer": seen["state"] + seen["projection"], **seen}
        shown = ("weights", "gradients", "optimizer", "projection", "activations", "peak")
        cells = [f"{parts[part] / 2**20:,.0f}" for part in shown]
        lines.append(f"| {name} | {' | '.join(cells)} | {seen['peak'] / few[first]['peak']:.0%} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: predicted / measured in MiB."""
    lines = [
        f"| MiB, predicted / measured | {' | '.join(PARTS.values())} | off by |",
        "| --- " * (len(PARTS) + 2) + "|",
    ]
    for row in rows:
        told, seen = row["predicted"] or dict.fromkeys(PARTS), row["measured"]
        cells = [
            " / ".join("-" if value is None else f"{value / 2**20:.1f}" for value in (told[part], seen[part]))
            for part in PARTS
        ]
        cells.append("-" if told["peak"] is None else f"{told['peak'] / seen['peak'] - 1:+.1%}")
        lines.append(f"| {label(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(row: dict[str, Any]) -> str:
    """The optimizer, and whether activations are computed again."""
    return row["optim"] + (", checkpointing" if row["gradient_checkpointing"] else "")


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the predicted peak by part, where it is predicted, with the measured peak as a line."""
    from matplotlib.figure import Figure

    rows = rows[::-1]
    names = [fill(label(row).replace(",", ", ").replace("  ", " "), 48) for row in rows]
    lines = max(name.count("\n") for name in names)
    figure = Figure(figsize=(9, 1.4 + (0.3 + 0.15 * lines) * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part, (name, color) in COLORS.items():
        told = [row["predicted"] or row["measured"] for row in rows]
        fixed = [sum(parts[key] for key in list(COLORS)[:-1]) for parts in told]
        sizes = [
            parts["peak"] - rest if part == "rest" else parts[part] for parts, rest in zip(told, fixed, strict=True)
        ]
        axes.barh(range(len(rows)), [size / 2**20 for size in sizes], left=left, color=color, label=name)
        left = [a + size / 2**20 for a, size in zip(left, sizes, strict=True)]
    for y, row in enumerate(rows):
        axes.vlines(
            row["measured"]["peak"] / 2**20, y - 0.45, y + 0.45, color="black", label="measured" if y == 0 else None
        )
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.set_xlabel("peak of a training step, MiB")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=130)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`, `<path>_all.md` and `<path>.png`."""
    named(path, ".md").write_text(summary(result["rows"]))
    named(path, "_all.md").write_text(table(result["rows"]))
    blocks = f", {result['layers']} blocks" if result["layers"] else ""
    tokens = f"{result['batch']} x {result['seq']} tokens"
    title = f"{result['model']}{blocks}, {result['dtype']}, rank {result['rank']}, {tokens}"
    plot(result["rows"], title, named(path, ".png"))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="file in experiments/, whose settings are the defaults then")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="llama_350m", help="file in llama_configs/, or a path")
    parser.add_argument("--layers", type=int, default=0, help="blocks (default: all)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="optimizers (default: all)")
    parser.add_argument("--checkpointing", action="store_true", help="all runs with it, and none without")
    parser.add_argument("--add", action="store_true", help="put these runs into the result that there is")
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    experiment = parser.parse_known_args()[0].experiment
    if experiment:
        given = {key: value for key, value in load_experiment(experiment).items() if key not in ("script", "title")}
        parser.set_defaults(**given)
    settings = parser.parse_args()
    rows = run_all(settings)
    chosen = {key: getattr(settings, key) for key in ("device", "model", "layers", "dtype", "rank", "batch", "seq")}
    result = {"environment": describe(), **chosen, "rows": rows}
    path = (settings.output_dir or results_folder()) / (experiment or "memory")
    save(path, added(path, result, ("optim", "gradient_checkpointing")) if settings.add else result, render)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
