"""Gradients that arrive one at a time: hooks, accumulation windows, clipping, and exchange between processes."""
