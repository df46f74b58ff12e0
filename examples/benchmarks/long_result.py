"""The result of the long comparison in results/: what it tells of runs, and what may be put in its place."""

from pathlib import Path
from typing import Any

from environment import named, read, save_new
from long_rows import Contender, recalled, recalled_starts, render


Known = dict[str, dict[str, dict[str, Any]]]  # results of runs by stage (`"search"`, `"long"`) and name


def refuse_other_text(path: Path, there: dict[str, Any], data: dict[str, Any] | None) -> None:
    """Folders of the same name may hold another text."""
    if there["rows"] and there.get("data") != data:
        why = "was measured on another text" if "data" in there else "does not tell which text it was measured on"
        raise SystemExit(
            f"{named(path, '.json')} {why}: give that --data, or call the folder otherwise, or move the result away "
            "to measure all again."
        )


def known_runs(contenders: list[Contender], there: dict[str, Any], result: dict[str, Any], path: Path) -> Known:
    """The runs that the result was made of; contenders get what these were made with."""
    for key in ("common", "search", "long"):
        if there["rows"] and there[key] != result[key]:
            raise SystemExit(f"{named(path, '.json')} was measured with another {key}: leave --add out.")
    rows = {row["method"]: row for row in there["rows"]}
    known: Known = {"search": {}, "long": {}}
    for contender in contenders:
        if row := rows.get(contender.search.name):
            for stage, runs in recalled(contender, row).items():
                known[stage] |= runs
            contender.starts += recalled_starts(row, there["environment"])
    return known


def rows_of(contenders: list[Contender], there: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The rows, and of the times that the result has those of settings and arguments that are still the rows'."""
    rows = [contender.row for contender in contenders if contender.results]
    if "times" not in there or any(there[key] != result[key] for key in ("common", "long")):
        return {"rows": rows}
    timed = {row["method"]: timed_of(row) for row in there["rows"]}
    same = {row["method"] for row in rows if timed_of(row) == timed.get(row["method"])}
    seconds = {name: second for name, second in there["times"]["seconds_per_step"].items() if name in same}
    return {"rows": rows, "times": there["times"] | {"seconds_per_step": seconds}}


def timed_of(row: dict[str, Any]) -> tuple[Any, Any]:
    """What a row's time is of."""
    return row["best"], list(row["arguments"])


def refuse_changed(path: Path, there: dict[str, Any]) -> None:
    """The result may have got other rows, from elsewhere, since this began."""
    if read(path) != there:
        raise SystemExit(
            f"{named(path, '.json')} has changed since this began, and stays as it is. What has been run is kept: "
            "call the same again."
        )


def write(path: Path, there: dict[str, Any], result: dict[str, Any], folder: Path, add: bool) -> None:
    """Writes a result that lacks no method, and no seed of one, which the one that there is has."""
    found = {row["method"]: row for row in result["rows"]}
    lost = [
        row["method"]
        for row in there["rows"]
        if any(
            len(found.get(row["method"], {}).get(seeds, ())) < len(row[seeds]) for seeds in ("seeds", "short_seeds")
        )
    ]
    if lost and add:
        raise SystemExit(
            f"Of {', '.join(lost)} neither the result nor {folder} has all runs that the experiment asks for now, as "
            f"where a grid has grown: run them by --add --methods {' '.join(lost)}. Nothing is written before."
        )
    if lost or not found:
        raise SystemExit(
            f"{folder} has no finished runs of {', '.join(lost) or 'any method'}: give another --work_dir, or keep "
            "them by --add."
        )
    refuse_changed(path, there)
    save_new(path, result, render)
