"""Training arguments to change."""

from typing import Any

import pytest
from transformers import TrainingArguments

from hf_osd import OSDTrainingArguments


@pytest.fixture
def stock(tmp_path):
    """Stock training arguments."""

    def make(**given: Any) -> TrainingArguments:
        return TrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **given})

    return make


@pytest.fixture
def typed(tmp_path):
    """Our training arguments."""

    def make(**given: Any) -> OSDTrainingArguments:
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "optim": "osd_adamw"}
        return OSDTrainingArguments(**{**defaults, **given})

    return make
