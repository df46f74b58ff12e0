"""What `hf-osd estimate` computes, and how it tells it."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from math import prod
from typing import Any

from torch import nn

from ..estimate import (
    DTYPES,
    Method,
    Workload,
    adamw,
    adamw8bit,
    explained,
    galore,
    largest,
    load_config,
    lora,
    osd,
    share,
    subzero,
)
from ..optim import OPTIM_NAMES, create_osd_optimizer, select
from ..optim.options.mode import LAYERWISE_SUFFIX
from ..optim.step.sharding import INT8_NOT_SHARDED
from ..subzero.options import KEYS as SUBZERO_KEYS
from ..subzero.options import Options as SubZeroOptions
from ..text import format_bytes, format_count, table
from ..trainer.optim_args import parse_optim_args
from .estimate_options import estimated_optimizer
from .suggestion import suggestion, suggestion_text


LABELS = {
    "adamw_torch_fused": "AdamW",
    "adamw_bnb_8bit": "AdamW 8-bit",
    "galore_adamw": "GaLore",
    "lora": "LoRA {lora_rank}, AdamW",
    "subzero": "{subzero}, forward only",
}
COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "state",
    "projection": "P",
    "activations": "activations",
    "logits": "logits, loss",
    "temporaries": "step",
    "peak": "peak",
}


def make_report(
    arguments: argparse.Namespace, memory: int | None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Everything that is told, as JSON values.

    Args:
        arguments (`argparse.Namespace`): The options of the command.
        memory (`int`, *optional*): Bytes that tensors may take, if there is a limit.
        say (`Callable`, *optional*): Is told what is being run.
    """
    lora_rank = arguments.rank if arguments.lora_rank is None else arguments.lora_rank
    numbers = {"rank": arguments.rank, "lora_rank": lora_rank, "seq": arguments.seq, "batch": arguments.batch}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}.")
    optim, layerwise, options = estimated_optimizer(arguments)
    forward_only = SubZeroOptions(**parse_optim_args(arguments.subzero_args, SUBZERO_KEYS, "`--subzero_args`"))
    config = load_config(arguments.model, arguments.revision)
    work = Workload(config, DTYPES[arguments.dtype], arguments.seq, lora_rank)
    with explained(f"no model can be made of {arguments.model!r}"):
        model = work.model()
    modules, excluded = options["target_modules"], options["exclude_modules"]
    shapes = [tuple(p.shape) for p in select(model, modules, excluded).projected.values()]
    highest = max(min(shape[-2:]) for shape in shapes)
    if arguments.rank > highest:
        raise ValueError(f"--rank {arguments.rank} is more than any of the matrices has: give at most {highest}.")

    @cache
    def ours(rank: int, layerwise: bool = layerwise) -> Method:
        return osd(model, optim, rank, options, layerwise=layerwise)

    say(f"steps of {optim}{LAYERWISE_SUFFIX * layerwise}")
    own = [subzero(model, forward_only), ours(arguments.rank)]  # first: what is wrong with their options
    kinds, missing = available(work, arguments.batch, say)
    methods = [adamw(model), adamw8bit(model), galore(model, arguments.rank, modules, excluded)]
    methods += [lora(work.model("lora"))] if ("lora", False) in kinds else []
    methods += own

    def rows_of(methods: list[Method], of_rank: Callable[[int], Method]) -> list[dict[str, Any]]:
        return [
            _row(work, method, checkpointing, arguments, memory, (of_rank, highest), say)
            for checkpointing in (False, True)
            for method in methods
            if (method.unprepared, checkpointing) in kinds
        ]

    rows = rows_of(methods, ours)
    if memory is not None and optim + LAYERWISE_SUFFIX in OPTIM_NAMES and not (layerwise or _ours_fits(rows)):
        rows += rows_of([ours(arguments.rank, True)], partial(ours, layerwise=True))
    report: dict[str, Any] = {
        **{
            key: getattr(arguments, key)
            for key in ("model", "revision", "rank", "batch", "seq", "dtype", "optim_args", "subzero_args")
        },
        "lora_rank": lora_rank,
        "subzero": "MeZO" if forward_only.perturbation == "dense" else f"SubZero {forward_only.rank}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": sum(prod(shape[:-2]) for shape in shapes),
        "clipped": sum(prod(shape[:-2]) for shape in shapes if arguments.rank > min(shape[-2:])),
        **processes_report(arguments, model, optim, options, ours),
        "projection_file_bytes": ours(arguments.rank).saved,
        "missing": missing,
        "rows": rows,
    }
    if memory is not None:
        report |= {
            "gpu": arguments.gpu,
            "usable_bytes": memory,
            "suggestion": suggestion(report, modules, excluded, model),
        }
    return report


def _ours_fits(rows: list[dict[str, Any]]) -> bool:
    """Whether ours does at any batch."""
    return any(row["largest_batch"] for row in rows if row["method"] in OPTIM_NAMES)


def _row(
    work: Workload,
    method: Method,
    checkpointing: bool,
    arguments: argparse.Namespace,
    memory: int | None,
    ours: tuple[Callable[[int], Method], int],  # by rank, and the highest
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A method's parts, and where there is a limit, what fits it."""
    batch, (of_rank, highest) = arguments.batch, ours
    parts = work.parts(method, checkpointing, batch)
    row: dict[str, Any] = {"method": method.name, "gradient_checkpointing": checkpointing, "bytes": asdict(parts)}
    if memory is None:
        return row
    say(f"what fits with {method.name}{' and gradient checkpointing' * checkpointing}")
    row |= {"fits": parts.peak <= memory, "largest_batch": work.largest_batch(method, checkpointing, memory)}
    if method.unprepared == "full" and method.name in OPTIM_NAMES:
        unit = max(1, highest // 256)  # ranks in between are asked for by nobody
        row["largest_rank"] = unit * largest(
            lambda k: work.parts(of_rank(k * unit), checkpointing, batch).peak,
            memory,
            highest // unit,
            first=max(1, arguments.rank // unit),
        )
    return row


def processes_report(
    arguments: argparse.Namespace,
    model: nn.Module,
    optim: str,
    options: dict[str, Any],
    ours: Callable[[int], Method],
) -> dict[str, Any]:
    """What each process holds, of several, with P divided among them and whole on each."""
    processes = arguments.processes
    if processes is None:
        return {}
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}.")
    prepared = ours(arguments.rank).prepared
    if ours(arguments.rank).layerwise:
        raise ValueError("--processes is for steps that are not layerwise, as FSDP2 has them: leave one of them out.")
    if options.get("weight_dtype") is not None:
        raise ValueError(INT8_NOT_SHARDED)
    if prepared is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`rank` is")
            optimizer = create_osd_optimizer(model, optim, rank=arguments.rank, **options)
    else:  # whose layers know which of them share P
        model, optimizer = prepared
    each = {
        name: asdict(share(model, optimizer, processes, divide=name == "divided")) for name in ("divided", "whole")
    }
    return {"processes": processes, "each_process": each}


def available(
    work: Workload, batch: int, say: Callable[[str], None] = lambda text: None
) -> tuple[set[tuple[str, bool]], list[str]]:
    """The models, each with whether it checkpoints, that can be run, and what cannot be, with the reason.

    Raises:
        ValueError: If not even the model itself can.
    """
    say("a step on the meta device")
    work.run("full", False, batch)
    found, missing = {("full", False)}, []
    for name, kind, checkpointing in (
        ("LoRA", "lora", False),
        ("forward passes alone", "forward", False),
        ("gradient checkpointing", "full", True),
        ("LoRA with gradient checkpointing", "lora", True),
    ):
        if checkpointing and kind == "lora" and not {("lora", False), ("full", True)} <= found:
            continue  # said already
        say(name)
        try:
            work.run(kind, checkpointing, batch)
            found.add((kind, checkpointing))
        except ImportError:
            missing.append(f"{name}: it needs peft, `pip install peft`")
        except ValueError as error:
            missing.append(f"{name}: {error}")
    return found, missing


def _shares(each: dict[str, dict[str, int]]) -> str:
    titles = {"weights": "weights", "gradients": "gradients", "state": "state"}
    titles |= {"projection": "P", "projection_moments": "P's moments"}
    ways = {"divided": "P divided", "whole": "P whole on each"}
    lines = [[ways[way], *(format_bytes(own[key], 2, "MB") for key in titles)] for way, own in each.items()]
    return table(["", *titles.values()], lines, left=("",))


def report_text(report: dict[str, Any]) -> str:
    """Two tables, without and with checkpointing, what fits, and the command."""
    kind = str(DTYPES[report["dtype"]]).removeprefix("torch.")
    text = [
        f"{report['model']}: {format_count(report['parameters'], 'M')} parameters in {kind}; rank {report['rank']} of "
        f"{report['matrices']} matrices; {report['batch']} x {report['seq']} tokens"
    ]
    if report["clipped"]:
        text.append(f"rank {report['rank']} is larger than {report['clipped']} of the matrices, and clipped there")
    limit = "gpu" in report
    header = ["", *COLUMNS.values(), *([f"fits {report['gpu']}", "largest batch"] if limit else [])]
    for checkpointing in (False, True):
        rows = [row for row in report["rows"] if row["gradient_checkpointing"] == checkpointing]
        if not rows:
            continue
        lines = [
            [
                LABELS.get(row["method"], row["method"]).format(**report),
                *(format_bytes(row["bytes"][key], 2, "MB") if row["bytes"][key] else "-" for key in COLUMNS),
                *(["yes" if row["fits"] else "no", str(row["largest_batch"])] if limit else []),
            ]
            for row in rows
        ]
        text += [
            "",
            f"{'with' if checkpointing else 'without'} gradient checkpointing",
            table(header, lines, left=("",)),
        ]
        if limit:
            text.append(f"largest rank of {rows[-1]['method']} at this batch: {rows[-1]['largest_rank'] or 'none'}")
    if "processes" in report:
        text += [
            "",
            f"each of {report['processes']} processes of FSDP2, between steps",
            _shares(report["each_process"]),
        ]
    text += ["", f"P on the Hub: {format_bytes(report['projection_file_bytes'], 2, 'MB')}"]
    text += [f"not estimated: {name}" for name in report["missing"]]
    if limit:
        text += suggestion_text(report)
    return "\n".join(text)
