"""Where files are: in a folder, or in a repository on the Hub, from one commit of it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..version import __version__
from .checks import ProjectionFileError


@dataclass
class Source:
    """A folder, or a repository on the Hub whose files are downloaded when they are asked for.

    Args:
        id_or_folder (`str` or `os.PathLike`): A folder, or a repository id such as `user/name`.
        revision (`str`, *optional*):
            Branch, tag or commit. The commit of the first file found is kept for all that follow, so that a push in
            between cannot mix two sets.
        subfolder (`str`, *optional*): Folder inside it, such as `checkpoint-500`.
        token (`str` or `bool`, *optional*): As everywhere with the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*): Likewise.
        local_files_only (`bool`, *optional*, defaults to `False`): Only what the cache holds.
        force_download (`bool`, *optional*, defaults to `False`): Whatever the cache holds.
    """

    id_or_folder: str | os.PathLike
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def name(self) -> str:
        """What a message calls it."""
        return "/".join(filter(None, (os.fspath(self.id_or_folder), self.subfolder)))

    def path(self, file: str) -> Path:
        """The file on this machine, downloaded where it has to be.

        Raises:
            ProjectionFileError: If the folder or repository has no such file.
            OSError: As `huggingface_hub` raises it, for a repository or network that cannot be reached.
        """
        found = self.find(file)
        if found is None:
            hint = self._hint() if file == "osd_config.json" else ""
            raise ProjectionFileError(f"{file} is missing in {self.name}{hint}.")
        return found

    def _hint(self) -> str:
        """Where a P is, or why there is none, if the folder tells it; a push to the Hub is whole or not at all."""
        folder = Path(self.id_or_folder, self.subfolder or "")
        inside = [path.parent.name for path in folder.glob("*/osd_config.json")]
        if inside:
            newest = max(inside, key=lambda name: (len(name), name))  # of checkpoint-500 and checkpoint-1000
            return f": give {folder / newest}, which has one"
        if list(folder.glob("*osd_projection*")):
            return " (it is written last: a save was interrupted)"
        return ": checkpoints have one, and ProjectionState.save_pretrained writes it" if folder.is_dir() else ""

    def find(self, file: str) -> Path | None:
        """The file on this machine, or `None` if the folder or repository has none of that name."""
        if os.path.isdir(self.id_or_folder):
            path = Path(self.id_or_folder, self.subfolder or "", file)
            return path if path.exists() else None
        return self._download(file)

    def _download(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            path = hf_hub_download(
                os.fspath(self.id_or_folder),
                file,
                subfolder=self.subfolder,
                revision=self.revision,
                token=self.token,
                cache_dir=os.fspath(self.cache_dir) if self.cache_dir is not None else None,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                library_name="hf_osd",
                library_version=__version__,
            )
        except HFValidationError as error:
            raise ProjectionFileError(f"{self.name!r} is neither a folder nor the id of a repository.") from error
        except LocalEntryNotFoundError as error:  # the Hub was not asked: nothing is known of the file
            raise LocalEntryNotFoundError(f"{self.name} is no folder here, and on the Hub: {error}") from error
        except EntryNotFoundError:
            return None
        commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)
        if commit:
            self.revision = commit.group(1)
        return Path(path)
