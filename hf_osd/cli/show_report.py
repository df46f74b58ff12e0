"""What `hf-osd show` finds, and how it tells it: as a table or a picture."""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from ..hub import ProjectionFileError, ProjectionState
from ..hub.analysis import ModelWeights, orthogonality, random_share, share_of_change
from ..hub.config import FURTHER_OPTIONS
from ..hub.locate import Source
from ..text import format_bytes, layer_and_kind, printable, table


SETTINGS = ("optim", "weight_rule", "projection_rule", "subspace", "alpha", "lambda", "scale", "weight_decay", "step")
OTHER_SETTINGS = ("update_interval", *FURTHER_OPTIONS)  # shown where there are any


def inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known of a saved P, as JSON values."""
    state = ProjectionState.from_pretrained(arguments.source, revision=arguments.revision)
    models = _models(arguments) if arguments.base else None
    rows = []
    for name, entry in state.items():
        row: dict[str, Any] = {
            "name": name,
            "shape": list(entry.shape),
            "rank": entry.rank,
            "side": entry.side,
            "dtype": str(entry.projection.dtype).removeprefix("torch."),
            "holder": entry.holder,
            "orthogonality": statistics.fmean(map(orthogonality, entry.factors)),
        }
        if models:
            before, after = (model.get(name, entry.shape) for model in models)
            row["share"] = None
            if before is not None and after is not None:
                row["share"] = share_of_change(entry, after.float() - before.float())
            row["random_share"] = random_share(entry)
        rows.append(row)
    config = state.config
    return {
        "source": arguments.source,
        "config": {key: config.get(key) for key in SETTINGS}
        | {key: config[key] for key in OTHER_SETTINGS if config.get(key) is not None},
        "bytes": sum(entry.projection.nbytes for entry in state.values() if entry.holder is None),
        "moments": any(entry.moments for entry in state.values()),
        "parameters": rows,
    }


def _models(arguments: argparse.Namespace) -> tuple[ModelWeights, ModelWeights]:
    base = ModelWeights(Source(arguments.base))
    if arguments.model:
        return base, ModelWeights(Source(arguments.model))
    try:
        return base, ModelWeights(Source(arguments.source, arguments.revision))
    except ProjectionFileError as error:
        raise ValueError(f"{error} Give the trained model as --model.") from error


def inspect_text(report: dict[str, Any]) -> str:
    """The report as a table with a line on the settings above and the means below."""
    rows, with_share = report["parameters"], "share" in report["parameters"][0]
    shared = sum(row["holder"] is not None for row in rows)
    header = ["parameter", "shape", "rank", "side", *(["P of"] if shared else []), "orthogonality"]
    header += ["share", "random"] if with_share else []
    lines = [
        [
            row["name"],
            " x ".join(map(str, row["shape"])),
            str(row["rank"]),
            row["side"],
            *([_holder(row)] if shared else []),
            f"{row['orthogonality']:.2e}",
            *([_percent(row["share"]), _percent(row["random_share"])] if with_share else []),
        ]
        for row in rows
    ]
    settings = ", ".join(f"{key} {value}" for key, value in report["config"].items() if value is not None)
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    text = [
        f"{report['source']}: {len(rows) - shared} projections{f' of {len(rows)} matrices' if shared else ''}, "
        f"{format_bytes(report['bytes'], 2, 'MB')} in {dtypes}" + (", with moments" if report["moments"] else ""),
        *([printable(settings)] if settings else []),
        "",
        table(header, lines, left=("parameter", "side", "P of")),
        "",
        f"orthogonality: mean {statistics.fmean(row['orthogonality'] for row in rows):.2e}, "
        f"largest {max(row['orthogonality'] for row in rows):.2e}",
    ]
    if with_share:
        shares = [row["share"] for row in rows if row["share"] is not None]
        mean = _percent(statistics.fmean(shares)) if shares else "-"
        without = f"; {len(rows) - len(shares)} without (unchanged, or not found)" if len(shares) < len(rows) else ""
        text.append(f"share of the change in P's subspace: mean {mean} of {len(shares)} weights{without}")
    return "\n".join(text)


def _holder(row: dict[str, Any]) -> str:
    """The kind of the weight that holds P, or its name where that is in another layer."""
    if row["holder"] is None:
        return ""
    (layer, _), (of_holder, kind) = map(layer_and_kind, (row["name"], row["holder"]))
    return kind if layer == of_holder else row["holder"]


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw each P's orthogonality, and shares where there are any, over the layers; a line for each kind of weight."""
    from matplotlib.figure import Figure

    values = ["orthogonality", *(["share"] if "share" in rows[0] else [])]
    figure = Figure(figsize=(9, 1 + 3 * len(values)), layout="constrained")
    lines = {}
    for axes, value in zip(figure.subplots(len(values), 1, squeeze=False, sharex=True)[:, 0], values, strict=True):
        for i, (kind, points) in enumerate(_by_kind(rows).items()):
            own = [row for row in points if value == "share" or row[1]["holder"] is None]  # a P once
            drawn = [(layer, row[value]) for layer, row in own if row[value] is not None]
            if drawn:
                (lines[kind],) = axes.plot(*zip(*drawn, strict=True), color=f"C{i}", marker="o", markersize=4)
        axes.set_ylim(bottom=0, top=1.02 if value == "share" else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    labels = {"orthogonality": "||PᵀP − I|| / √r", "share": "share of the change in P's subspace"}
    for axes, value in zip(figure.axes, values, strict=True):
        axes.set_ylabel(labels[value])
    figure.axes[-1].set_xlabel("layer")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        layer, kind = layer_and_kind(row["name"])
        kinds.setdefault(kind, []).append((layer, row))
    return kinds


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
