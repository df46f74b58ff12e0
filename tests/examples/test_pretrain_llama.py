import json
import math

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

import pretrain_llama
from scaled_adamw import scaled_adamw


def command(folder, config, output_dir, *options):
    return [
        *("--dataset", str(folder), "--model", str(config), "--output_dir", str(output_dir)),
        *("--train_tokenizer", "300", "--sequence_length", "32", "--optim", "adamw_torch_fused"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"),
        *options,
    ]


def test_adamw_with_multiples_of_its_rate(tiny_config, tmp_path):
    model = LlamaForCausalLM(LlamaConfig.from_json_file(tiny_config))
    args = pretrain_llama.OSDTrainingArguments(str(tmp_path), optim="adamw_torch_fused", learning_rate=0.01)
    assert scaled_adamw(model, None, None, args) is None
    optimizer = scaled_adamw(model, 0.5, 8, args)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        times = 8 if "embed_tokens" in name or "lm_head" in name else 0.5 if "_proj" in name else 1
        assert rates[p] == pytest.approx(0.01 * times), name
    args.optim = "osd_adamw"
    with pytest.raises(ValueError, match="--block_scale and --embedding_ratio are for --optim adamw_torch_fused"):
        scaled_adamw(model, None, 8, args)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_steps_end_to_end(jsonl_folder, tiny_config, tmp_path, capsys, streaming):
    output_dir = tmp_path / "run"
    results = pretrain_llama.main(
        command(jsonl_folder, tiny_config, output_dir, "--max_steps", "2", "--streaming", streaming)
    )
    assert json.loads((output_dir / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["steps"] == 2 and results["tokens_seen"] == 2 * 2 * 32
    assert results["perplexity"] == math.exp(results["eval_loss"])
    assert results["parameters"] * 8 == results["adamw_state_bytes"] <= results["optimizer_state_bytes"]
    assert results["tokens_per_second"] > 0 and results["peak_memory_bytes"] > 0
    assert results["settings"]["optim"] == "adamw_torch_fused" and results["settings"]["learning_rate"] == 1e-3
    assert not any(name.startswith("osd_") for name in results["settings"])
    assert sum(group["parameters"] for group in results["parameter_groups"]) == results["parameters"]
    history = results["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all("eval_perplexity" in entry for entry in history if "eval_loss" in entry)
    assert (output_dir / "loss.png").stat().st_size > 10_000

    printed = capsys.readouterr().out
    assert f"{results['perplexity']:.2f}" in printed and "AdamW's would be" in printed and "results.json" in printed

    model, tokenizer = LlamaForCausalLM.from_pretrained(output_dir), AutoTokenizer.from_pretrained(output_dir)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_resumed_run_continues_to_the_same_loss(jsonl_folder, tiny_config, tmp_path):
    options = ("--max_steps", "4", "--save_steps", "2", "--eval_strategy", "no")
    whole = pretrain_llama.main(command(jsonl_folder, tiny_config, tmp_path / "run", *options))
    resumed = pretrain_llama.main(
        command(
            jsonl_folder,
            tiny_config,
            tmp_path / "run",
            *options,
            *("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")),
        )
    )
    assert resumed["eval_loss"] == whole["eval_loss"]  # the same floating-point operations in the same order
    assert resumed["tokens_seen"] == whole["tokens_seen"]


def test_rso_reports_the_plain_model_and_what_it_keeps(jsonl_folder, tiny_config, tmp_path):
    options = ("--osd_rank", "4", "--osd_update_interval", "2", "--max_steps", "4", "--save_steps", "3")
    rso = command(jsonl_folder, tiny_config, tmp_path / "run", *options)
    rso[rso.index("adamw_torch_fused")] = "rso_adamw"
    results = pretrain_llama.main(rso)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run")
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["adamw_state_bytes"] == 8 * results["parameters"]
    matrices = [p.shape for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    outside = results["parameters"] - sum(m * n for m, n in matrices)
    blocks, others = model.config.num_hidden_layers, len(list(model.parameters())) - len(matrices)
    size, inner = model.config.hidden_size, model.config.intermediate_size
    counters, inputs = 4 * (3 * len(matrices) + 2 * others), blocks * (8 * 4 + 4 * 4 * (3 * size + inner))
    assert results["optimizer_state_bytes"] == 8 * (sum(4 * m for m, _ in matrices) + outside) + counters + inputs
    assert results["settings"]["osd_update_interval"] == 2 and results["settings"]["osd_rank"] == 4
    resumed = pretrain_llama.main([*rso, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")])
    assert resumed["eval_loss"] == results["eval_loss"]


def test_resume_true_takes_the_last_checkpoint(jsonl_folder, tiny_config, tmp_path):
    _, training_args = pretrain_llama.parse_arguments(
        command(jsonl_folder, tiny_config, tmp_path / "run", "--resume_from_checkpoint", "true")
    )
    assert training_args.resume_from_checkpoint is True


def test_trainer_is_stock(jsonl_folder, tiny_config, tmp_path):
    args, training_args = pretrain_llama.parse_arguments(
        command(jsonl_folder, tiny_config, tmp_path / "run", "--max_steps", "1")
    )
    assert type(pretrain_llama.build_trainer(args, training_args, [])) is Trainer


def test_unknown_model_names_the_known_ones(documents):
    tokenizer = pretrain_llama.trained_tokenizer([{"text": text} for text in documents], "text", 300)
    with pytest.raises(ValueError, match="llama_2b is neither a file nor one of llama_1b, .*llama_60m.*quickstart"):
        pretrain_llama.load_model_config("llama_2b", tokenizer, 256)
    with pytest.raises(ValueError, match="--sequence_length 2048 is more than the 1024 positions of llama_60m"):
        pretrain_llama.load_model_config("llama_60m", tokenizer, 2048)


def test_tokenizer_options_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        pretrain_llama.parse_arguments(["--tokenizer", "t5-base", "--train_tokenizer", "4096"])


def test_default_tokenizers():
    assert pretrain_llama.PretrainingArguments(dataset="docstrings").train_tokenizer == 4096
    assert pretrain_llama.PretrainingArguments(dataset="docstrings", tokenizer="t5-base").train_tokenizer is None
    assert pretrain_llama.PretrainingArguments().train_tokenizer is None
    assert pretrain_llama.DEFAULT_TOKENIZER == "t5-base"


def test_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="(?s)could not be loaded.*--train_tokenizer"):
        pretrain_llama.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", sorted(pretrain_llama.CONFIG_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_model_sizes_are_what_the_names_say(path):
    config = LlamaConfig.from_json_file(path)
    h, i = config.hidden_size, config.intermediate_size
    parameters = 2 * h * config.vocab_size + config.num_hidden_layers * (4 * h * h + 3 * h * i + 2 * h) + h
    assert not config.tie_word_embeddings and config.head_dim % 2 == 0  # rotary embeddings turn pairs
    size = path.stem.removeprefix("llama_")
    if size == "quickstart":
        assert 4e6 < parameters < 5e6
    else:
        named = float(size[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[size[-1]]
        # the family's names are loose: 1b has 1.34 billion, 3b 2.69 billion
        assert parameters == pytest.approx(named, rel=0.35)
