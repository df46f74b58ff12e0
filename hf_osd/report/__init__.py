"""One HTML page about training runs, from the files that they left."""

from .page import render
from .runs import Run, RunError, read_run, read_runs


__all__ = ["Run", "RunError", "read_run", "read_runs", "render"]
