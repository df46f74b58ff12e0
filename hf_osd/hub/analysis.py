"""What P looks like, and how much of a weight's change lies in its subspace. Letters as in `subspace.operators`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..subspace import OPERATORS
from .checks import ProjectionFileError, read_json
from .locate import Source
from .projection import Projection


WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = WEIGHTS_NAME + ".index.json"


def orthogonality(P: Tensor) -> float:
    """||PᵀP - I|| / sqrt(r): 0 for orthonormal columns, 1 for P = 0. What `OSDCallback` logs.

    Of a stack the mean, over the experts whose P has started.
    """
    if P.ndim == 3:
        started = [orthogonality(P_e) for P_e in P if P_e.any()]
        return statistics.fmean(started) if started else 1.0
    P = P.double()
    C = P.mT @ P
    C.diagonal().sub_(1)
    return float(torch.linalg.matrix_norm(C)) / math.sqrt(P.shape[1])


def orthonormal_basis(P: Tensor) -> Tensor:
    """Q with orthonormal columns that span what P's columns span, (s, rank of P); P itself is only nearly orthonormal.

    Columns of P that depend on those before them up to rounding add no direction.
    """
    Q, R = torch.linalg.qr(P.double())
    diagonal = R.diagonal().abs()
    eps = torch.finfo(P.dtype if P.dtype != torch.bfloat16 else torch.float32).eps
    return Q[:, diagonal > diagonal.max() * max(P.shape) * eps]


def share_of_change(entry: Projection, change: Tensor) -> float | None:
    """Share of a weight's change that lies in P's subspace: ||Q Qᵀ dW||² / ||dW||² (left), ||dW Q Qᵀ||² (right).

    With two sides ||Q Qᵀ dW S Sᵀ||², where S is a basis of the second factor.

    Args:
        entry ([`Projection`]): P, its side and shape.
        change (`torch.Tensor`): dW, in the shape of the weight. Of a stack all experts' energies are added up.

    Returns:
        `float` or `None`: From 0 to 1; a subspace drawn at random would have `random_share` on average. `None` where
            nothing changed.
    """
    dW = change.float()
    whole = dW.square().sum(dtype=torch.float64)
    if not whole > 0:
        return None
    matrices = zip(*entry.factors, dW, strict=True) if dW.ndim == 3 else [(*entry.factors, dW)]
    energy = [
        _inside(entry.side, dW_e, factors).square().sum(dtype=torch.float64)
        for *factors, dW_e in matrices
        if factors[0].any()  # an expert without P has not been trained
    ]
    return float(sum(energy) / whole)


def _inside(side: str, dW: Tensor, factors: Sequence[Tensor]) -> Tensor:
    bases = [orthonormal_basis(P).float() for P in factors]
    return bases[0].mT @ dW @ bases[1] if side == "two_sided" else OPERATORS[side].down(dW, bases[0])


def random_share(entry: Projection) -> float:
    """R / s for each of P's factors, where s is the size of the dimension that it projects."""
    return math.prod(entry.rank / factor.shape[-2] for factor in entry.factors)


@dataclass
class ModelWeights:
    """The weights of a saved model one by one, from `model.safetensors` or its shards; no other format is read.

    Args:
        source ([`~hub.locate.Source`]): A model's folder or repository.
    """

    source: Source
    _files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from safetensors import SafetensorError, safe_open

        path = self._find()
        where = f"{path.name} in {self.source.name}"
        if path.name == WEIGHTS_NAME:
            try:
                with safe_open(path, framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), WEIGHTS_NAME)
            except (SafetensorError, OSError) as error:
                raise ProjectionFileError(f"{where} cannot be read: {error}.") from error
            return
        weight_map = read_json(path, where).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
            raise ProjectionFileError(f"{where} has no weight_map of file names.")
        self._files = weight_map

    def _find(self) -> Path:
        unknown = None
        for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            try:
                path = self.source.find(name)
            except FileNotFoundError as error:  # not in the cache, and the Hub could not be asked
                unknown = error
                continue
            if path is not None:
                return path
        if unknown is not None:
            raise unknown
        raise ProjectionFileError(f"{self.source.name} holds no model: it has no {WEIGHTS_NAME}, nor an index.")

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The weight of this parameter name, or `None` if there is none or it has another shape.

        Weights saved from the model without its head lack the first parts of the name (`h.0.mlp.c_fc.weight` for
        `transformer.h.0.mlp.c_fc.weight`): they are found too.
        """
        from safetensors import SafetensorError, safe_open

        key = next((key for key in _suffixes(name) if key in self._files), None)
        if key is None:
            return None
        path: Path = self.source.path(self._files[key])
        try:
            with safe_open(path, framework="pt") as file:
                value = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ProjectionFileError(f"{key} in {self.source.name} cannot be read: {error}.") from error
        return value if tuple(value.shape) == shape else None


def _suffixes(name: str) -> list[str]:
    # Two parts at most are left off: more would let any `q_proj.weight` do.
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(min(3, len(parts)))]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")
