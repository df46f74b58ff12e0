"""Where all parts of a weight find its state."""

from torch import Tensor


State = dict[str, Tensor]


class Slot:
    """Where all parts of a weight find its state while it is stepped.

    Attributes:
        state (`dict`): The optimizer's own, or this process's parts of it. Empty between steps: a state that the user
            drops is freed.
    """

    def __init__(self) -> None:
        self.state: State = {}
