"""Renders the example in this folder from a run that it makes: a tiny LLaMA that learns bytes of source code.

What it does: pretrains a LLaMA of some 100,000 parameters on the source code of hf_osd, one byte a token, and writes
the card that a push of this model would carry, with its picture. Every figure in the card is from that run.

What it needs: matplotlib. Neither a GPU nor a network; about a minute on one CPU core.

    python model_cards/render.py
    python model_cards/render.py --max_steps 1000 --output cards
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hf_osd
from hf_osd.hub import ProjectionState
from hf_osd.hub.card.model_card import PICTURE_NAME, CardFacts, update_card


NAME = "llama-quickstart"
BLOCK = 128  # bytes of a row


def byte_rows() -> list[dict[str, Tensor]]:
    """The package's source code in rows of bytes."""
    package = Path(hf_osd.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))
    tokens = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(output_dir: str, max_steps: int) -> Trainer:
    """Trains in a stock `Trainer`, with every tenth row held out.

    Args:
        output_dir (`str`): Of the run.
        max_steps (`int`): Its length.
    """
    set_seed(0)
    rows = byte_rows()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    args = TrainingArguments(
        output_dir,
        optim="osd_adamw",
        optim_args="rank=16",
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_steps=max_steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        logging_steps=max(1, max_steps // 50),
        eval_strategy="steps",
        eval_steps=max(1, max_steps // 5),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    kept = [row for number, row in enumerate(rows) if number % 10]
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=kept, eval_dataset=rows[::10][:64])
    trainer.train()
    return trainer


def render(output: Path, max_steps: int) -> Path:
    """Trains and writes `llama-quickstart.md` and its picture.

    Args:
        output (`Path`): The folder to write to.
        max_steps (`int`): Length of the run.
    """
    with TemporaryDirectory() as folder:
        trainer = train(folder, max_steps)
        assert trainer.optimizer is not None and trainer.model is not None
        ProjectionState.from_optimizer(trainer.optimizer).save_pretrained(folder, include_moments=False)
        facts = CardFacts.from_run(
            trainer.optimizer,
            trainer.args,
            trainer.state,
            trainer.model,
            dataset="source code of hf_osd",
            repo_id=f"user/{NAME}",
        )
        card, picture = update_card(folder, facts), Path(folder, PICTURE_NAME)
        output.mkdir(parents=True, exist_ok=True)
        Path(output, f"{NAME}-loss.png").write_bytes(picture.read_bytes())
        text = card.read_text(encoding="utf-8").replace(PICTURE_NAME, f"{NAME}-loss.png")
    path = output / f"{NAME}.md"
    path.write_text(text, encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    """Renders the example.

    Args:
        argv (`list[str]`, *optional*): The command line; defaults to `sys.argv[1:]`.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--max_steps", type=int, default=300, help="length of the run")
    given = parser.parse_args(argv)
    print(render(given.output, given.max_steps))


if __name__ == "__main__":
    main()
