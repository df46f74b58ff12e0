"""The model card: what it tells of a run, and how it is written into a README.md."""
