"""Gradients that arrive one at a time: hooks, accumulation windows and clipping."""
