"""`ExtractedLora`: factors, biases and modules as a PEFT adapter, built, saved and pushed without the base's data.

Letters: B (m, r), A (r, n) LoRA's factors of a layer with m outputs and n inputs; r the rank.
"""

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..version import __version__
from .changes import Changes, entries
from .destination import check_folder, check_repository
from .lora_forms import targets


Factors = Mapping[str, tuple[Tensor, Tensor]]  # B and A by layer
TASKS = {  # what peft calls the task of an architecture
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "T5ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "BartForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class ExtractedLayer:
    """One linear layer of an [`ExtractedLora`].

    Attributes:
        shape (`tuple[int, int]`): (m, n), outputs and inputs.
        rank (`int`): r, of its own; the adapter has the largest one for all layers, filled up with zeros.
        kept (`float`): Share of the change that B A keeps, 1 - ||dW - B A||² / ||dW||².
        change (`float`): ||dW||, the Frobenius norm.
    """

    shape: tuple[int, int]
    rank: int
    kept: float
    change: float


@dataclass(frozen=True, eq=False)
class ExtractedLora:
    """A LoRA adapter made by [`extract_lora`], in peft's own form.

    Attributes:
        peft_model (`peft.PeftModel`):
            The adapter on a copy of the base without data (on the meta device): it can be saved, not run.
        layers (`dict[str, ExtractedLayer]`): Rank and kept share of each linear layer that changed.
        carried (`dict[str, float]`):
            Modules and biases that the adapter holds in full, with their relative change ||dW|| / ||W_base||.
        dropped (`dict[str, float]`): What changed and is not in the adapter, with its relative change.
        model_bytes (`int`): Bytes of the base's weights; `bytes` are the adapter's.
    """

    peft_model: Any
    layers: Mapping[str, ExtractedLayer]
    carried: Mapping[str, float]
    dropped: Mapping[str, float]
    model_bytes: int

    @property
    def config(self) -> Any:
        """The adapter's `peft.LoraConfig`."""
        return self.peft_model.peft_config["default"]

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the adapter, as peft saves them."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)

    @property
    def kept(self) -> float:
        """Share of the change of all linear layers together that the adapter keeps."""
        whole = sum(layer.change**2 for layer in self.layers.values())
        return sum(layer.kept * layer.change**2 for layer in self.layers.values()) / whole if whole else 1.0

    @property
    def rank(self) -> int:
        """The rank of all layers in the adapter's files: the largest of `layers`. `lora_alpha` is the same."""
        return self.config.r

    @property
    def limits(self) -> str:
        """One sentence on programs that cannot take all of it, empty if all can."""
        if not self.carried:
            return ""
        return (
            "vLLM refuses an adapter that carries modules or biases in full; llama.cpp drops norms and its converter "
            "stops at biases and heads: for them extract with carry='none'."
        )

    @property
    def bytes(self) -> int:
        """Bytes of the adapter's tensors."""
        return sum(value.numel() * value.element_size() for value in self.state.values())

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `adapter_model.safetensors`, `adapter_config.json` and peft's README.md into a folder.

        `peft.PeftModel.from_pretrained(base, save_directory)` reads it; of `limits`, if any, is warned.

        Raises:
            ValueError: If the folder holds a model, which would be loaded with the adapter from then on.
        """
        check_folder(save_directory)
        self._warn()
        self._write(save_directory)

    def _write(self, folder: str | os.PathLike) -> None:
        # peft would add the base's embeddings, in full, because of a target such as lm_head
        self.peft_model.save_pretrained(os.fspath(folder), save_embedding_layers=False)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a LoRA adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload the files of `save_pretrained` in one commit. A README.md that is there is kept, as peft updates it.

        Args:
            repo_id (`str`): Such as `user/name`; created if need be.
            commit_message (`str`, *optional*): Of the commit.
            private (`bool`, *optional*): Whether a repository that is created here is private.
            token (`str` or `bool`, *optional*): Defaults to the one of `hf auth login`.
            revision (`str`, *optional*): Branch, created if need be; defaults to `main`.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.

        Returns:
            `huggingface_hub.CommitInfo`: The commit.

        Raises:
            ValueError: If the repository holds a model, which everybody would load with the adapter from then on.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        check_repository(repo_id, token=token, revision=revision)
        self._warn()
        # PeftModel.push_to_hub would put transformers' empty card over peft's
        api = HfApi(token=token, library_name="hf_osd", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            try:
                card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_bytes()
                Path(folder, "README.md").write_bytes(card)
            except EntryNotFoundError:
                pass
            self._write(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )

    def _warn(self) -> None:
        if self.limits:
            warnings.warn(self.limits, stacklevel=3)


def build_adapter(tuned: nn.Module, base: nn.Module, changes: Changes, factors: Factors) -> Any:
    """A PeftModel on an empty copy of the base, whose adapter has these factors, biases and modules.

    All layers get the largest rank, smaller factors zeros: vLLM and llama.cpp read one `lora_alpha` and one scale, and
    peft's `rank_pattern` and `alpha_pattern` not at all.
    """
    from peft import LoraConfig, get_peft_model

    r = max(A.shape[0] for _, A in factors.values())
    config = LoraConfig(
        task_type=next((task for end, task in TASKS.items() if type(base).__name__.endswith(end)), None),
        r=r,
        lora_alpha=r,
        **targets(changes.linear),
        modules_to_save=list(changes.carried) or None,
        bias="lora_only" if changes.biases else "none",
        fan_in_fan_out=any(not isinstance(base.get_submodule(name), nn.Linear) for name in factors),
    )
    peft_model = get_peft_model(_without_data(base), config, low_cpu_mem_usage=True)
    if config.modules_to_save:  # peft adds the names of usual classifiers, whether they are there or not
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    _fill(peft_model, tuned, {name: _padded(B, A, r) for name, (B, A) in factors.items()})
    if changes.biases:
        _check_biases_are_saved(peft_model, changes)
    return peft_model


def _padded(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    more = r - A.shape[0]
    return nn.functional.pad(B, (0, more)), nn.functional.pad(A, (0, 0, 0, more))


def _check_biases_are_saved(peft_model: Any, changes: Changes) -> None:
    """Before 0.21, peft looks for the biases of bias="lora_only" under a name that they do not have."""
    from peft import __version__, get_peft_model_state_dict

    saved = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name in changes.biases:
        if f"base_model.model.{name.removesuffix('bias')}base_layer.bias" not in saved:
            raise ValueError(
                f"peft {__version__} would not save {name}: install peft 0.21 or newer, or leave biases and norms out "
                "with carry='head'."
            )


def _fill(peft_model: Any, tuned: nn.Module, factors: Factors) -> None:
    from peft import __version__
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    biases, filled = peft_model.peft_config["default"].bias != "none", set()
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            A: Any = module.lora_A["default"]
            B: Any = module.lora_B["default"]
            # peft goes by the end of a name, so it may take a layer more, which did not change
            zeros = (torch.zeros(B.weight.shape), torch.zeros(A.weight.shape))
            B.weight, A.weight = map(nn.Parameter, factors.get(name, zeros))
            filled.add(name)
            bias = getattr(tuned.get_submodule(name), "bias", None)
            if biases and bias is not None:
                module.get_base_layer().bias = nn.Parameter(bias.detach().to("cpu", copy=True))
        elif isinstance(module, ModulesToSaveWrapper):
            whole = entries(tuned.get_submodule(name))
            copies = {key: value.detach().to("cpu", copy=True) for key, value in whole.items()}
            module.modules_to_save["default"].load_state_dict(copies, assign=True)
    missing = [name for name in factors if name not in filled]
    if missing:
        raise ValueError(f"peft {__version__} makes no LoRA layer of {missing[0]}: name it in `modules_to_save`.")


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors are on the meta device; nothing of the model's size is allocated."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
