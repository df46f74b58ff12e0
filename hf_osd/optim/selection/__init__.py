"""Which parameters of a model are projected, by name; no optimizer is known here."""
