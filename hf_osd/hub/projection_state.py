"""`ProjectionState`: the subspaces of a run by parameter name, to save, share, look at, and start another run from."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..optim.osd import osd_of
from ..optim.selection.wrappers import plain_name
from ..version import __version__
from .checks import ProjectionFileError, moment_keys, name_fault
from .collect import projections_of
from .config import CONFIG_NAME, FORMAT_VERSION, check_config, options_config, versions
from .files import is_data_file, read_config, read_tensors, write_set
from .locate import Source
from .projection import Projection, check_values


class ProjectionState(Mapping[str, Projection]):
    """P of every projected weight by parameter name: a mapping that does not change.

    Its methods have the form of `huggingface_hub.ModelHubMixin`. It does not inherit from it, because that class
    writes a README.md, and removes and reads a config.json: in a model's folder those belong to the model.

    Args:
        projections (`Mapping[str, Projection]`): By parameter name.
        config (`dict`, *optional*):
            What P was learned with, in the names of `osd_config.json`. `parameters`, `format_version` and versions
            are filled in.

    Raises:
        ValueError: If there is none, or one whose name, side, rank, shape, dtype or values make no sense.

    Example:
    ```python
    >>> import torch
    >>> from hf_osd import OSD
    >>> from hf_osd.hub import ProjectionState

    >>> linear = torch.nn.Linear(64, 32)
    >>> optimizer = OSD([{"params": [("weight", linear.weight)], "rank": 8}], lr=1e-3)
    >>> linear(torch.randn(4, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> state = ProjectionState.from_optimizer(optimizer)
    >>> state["weight"].projection.shape
    torch.Size([32, 8])

    ```
    `state.save_pretrained(folder)` and `state.push_to_hub("user/name")` share it;
    `OSD(..., init=ProjectionState.from_pretrained("user/name").initial_projections())` starts from it.
    """

    def __init__(self, projections: Mapping[str, Projection], config: Mapping[str, Any] | None = None):
        if not projections:
            raise ValueError("A ProjectionState needs at least one projection.")
        self._projections = {plain_name(name): entry for name, entry in projections.items()}
        self._config = copy.deepcopy({key: value for key, value in (config or {}).items() if key != "files"})
        check_config(self.config, "the config of this ProjectionState")
        for name, entry in self.items():
            check_values(name, entry)
            if entry.holder is not None and not torch.equal(entry.projection, self[entry.holder].projection):
                raise ValueError(f"P of {name} is another than that of its holder {entry.holder}.")

    def __getitem__(self, name: str) -> Projection:
        return self._projections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._projections)

    def __len__(self) -> int:
        return len(self._projections)

    def __repr__(self) -> str:
        ranks = sorted({entry.rank for entry in self.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{type(self).__name__}({len(self)} projections, {rank})"

    @property
    def config(self) -> dict[str, Any]:
        """A copy of what `osd_config.json` holds, less the list of files."""
        return self._build_config(include_moments=True)

    def _build_config(self, include_moments: bool) -> dict[str, Any]:
        parameters = {
            name: {
                "side": entry.side,
                "rank": entry.rank,
                "shape": list(entry.shape),
                "moments": list(entry.moments) if include_moments else [],
                **({} if entry.holder is None else {"holder": entry.holder}),
            }
            for name, entry in self.items()
        }
        # What earlier versions can read, they may.
        version = FORMAT_VERSION if any(entry.holder for entry in self.values()) else 1
        fixed = {"format_version": version, "parameters": parameters}
        return {"format_version": version, **versions(), **copy.deepcopy(self._config), **fixed}

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, include_moments: bool = False) -> "ProjectionState":
        """A copy, on the CPU, of what an optimizer holds now.

        Where P is divided among processes, or experts are on different ones, all of them must call this, and each has
        all of P.

        Args:
            optimizer ([`OSD`]): Its groups need names, as `create_osd_optimizer` and a Trainer give them, or
                (name, parameter) pairs. accelerate's wrapper is looked through.
            include_moments (`bool`, *optional*, defaults to `False`): Take all other state of these weights too.

        Raises:
            ValueError: For another optimizer, parameters without names or with the same name, or when no projected
                parameter has been stepped yet. Those that have not are left out.
        """
        osd = osd_of(optimizer)
        if osd is None:
            raise ValueError(f"ProjectionState.from_optimizer needs an OSD optimizer, got {type(optimizer).__name__}.")
        groups = [group for group in osd.trained_groups if group["rank"] is not None]
        if not groups:
            raise ValueError("This optimizer projects nothing: none of its groups has a `rank`.")
        projections: dict[str, Projection] = {}
        steps = 0
        refuse_names(groups)
        for name, projection, count in projections_of(osd, include_moments):
            if name in projections:
                raise ValueError(f"Two parameters of this optimizer have the name {name}.")
            projections[name] = projection
            steps = max(steps, count)
        if not projections:
            raise ValueError("No projected parameter has been stepped yet: there is no P before the first step.")
        return cls(projections, {**options_config(groups), "step": steps})

    def initial_projections(self) -> dict[str, Tensor]:
        """P by parameter name: what `init` of [`OSD`] and `create_osd_optimizer` takes."""
        return {name: entry.projection for name, entry in self.items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, max_shard_size: int | str = "5GB", include_moments: bool = True
    ) -> list[str]:
        """Write `osd_projection.safetensors`, or several with an index, and `osd_config.json` into a folder.

        An earlier set is replaced; no other file is touched. An interruption leaves the earlier set, or one that
        `from_pretrained` refuses. One process writes at a time.

        Args:
            save_directory (`str` or `os.PathLike`): Created if need be. A model's own folder is a good place.
            max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
            include_moments (`bool`, *optional*, defaults to `True`): Save the moments, where there are any.

        Returns:
            `list[str]`: The names of the files written.
        """
        tensors: dict[str, Tensor] = {}
        for name, entry in self.items():
            if entry.holder is None:
                tensors[name] = entry.projection
            if include_moments:
                tensors |= dict(zip(moment_keys(name, entry.moments), entry.moments.values(), strict=True))
        return write_set(Path(save_directory), tensors, self._build_config(include_moments), max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "ProjectionState":
        """Read a folder, or a repository on the Hub, that `save_pretrained` or `push_to_hub` has written to.

        The config is read and checked first, and only the files that it lists are downloaded, from the same commit.
        Nothing is loaded unless all files agree with it; only safetensors and JSON are read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a repository id.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            subfolder (`str`, *optional*): Folder inside it, such as `checkpoint-500`.
            token (`str` or `bool`, *optional*): Defaults to the one of `hf auth login`.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept.
            local_files_only (`bool`, *optional*, defaults to `False`): Do not ask the Hub.
            force_download (`bool`, *optional*, defaults to `False`): Download what is in the cache, too.

        Raises:
            ProjectionFileError: If a file is missing, damaged, inconsistent or from a newer version.
            OSError: As `huggingface_hub` raises it, where the repository or the Hub cannot be reached.
        """
        source = Source(
            pretrained_model_name_or_path, revision, subfolder, token, cache_dir, local_files_only, force_download
        )
        config = read_config(source.path(CONFIG_NAME), f"{CONFIG_NAME} in {source.name}")
        paths = {name: source.path(name) for name in config["files"]}
        tensors = read_tensors(config, paths, source.name)
        projections = {
            name: Projection(
                tensors[entry.get("holder") or name],
                entry["side"],
                entry["rank"],
                tuple(entry["shape"]),
                dict(zip(moments, (tensors[key] for key in moment_keys(name, moments)), strict=True)),
                entry.get("holder"),
            )
            for name, entry in config["parameters"].items()
            for moments in [entry.get("moments") or []]
        }
        try:
            return cls(projections, config)
        except ValueError as error:
            raise ProjectionFileError(f"{source.name}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload the projections of Online Subspace Descent",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        include_moments: bool = True,
    ) -> Any:
        """Upload the files of `save_pretrained` in one commit, in which an earlier set's other files are removed.

        Nothing else in the repository changes: no README.md is written.

        Args:
            repo_id (`str`): Such as `user/name`; created if need be.
            commit_message (`str`, *optional*): Of the commit.
            private (`bool`, *optional*): Whether a repository that is created here is private.
            token (`str` or `bool`, *optional*): Defaults to the one of `hf auth login`.
            revision (`str`, *optional*): Branch, created if need be; defaults to `main`.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.
            max_shard_size, include_moments: See `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`: The commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=token, library_name="hf_osd", library_version=__version__)
        with TemporaryDirectory() as folder:
            names = self.save_pretrained(folder, max_shard_size=max_shard_size, include_moments=include_moments)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            present = api.list_repo_files(repo_id, revision=revision)
            operations: list[Any] = [
                CommitOperationDelete(path_in_repo=name)
                for name in present
                if is_data_file(name) and name not in names
            ]
            operations += [CommitOperationAdd(name, Path(folder, name)) for name in names]
            return api.create_commit(
                repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
            )


def refuse_names(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise `ValueError` unless the parameters of these groups have names, and such as files can hold."""
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "The parameters of this optimizer have no names. Build it with create_osd_optimizer, or from "
                "(name, parameter) pairs such as model.named_parameters() gives."
            )
        for name in group["param_names"]:
            fault = name_fault(name)
            if fault:
                raise ValueError(f"The parameter name {name[:100]!r} {fault}.")
