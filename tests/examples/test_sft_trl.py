"""`examples/sft_trl.py` on tiny models: what it trains on, what it writes, what it refuses."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


pytest.importorskip("trl")

import chat_templates
import docstring_questions
import sft_trl
from hf_osd import OSD


# As the model's tokenizer has it (HuggingFaceTB/SmolLM2-135M-Instruct).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = SMOLLM2[SMOLLM2.index("{{'<|im_start|>' + message") :].replace("\n", "\\n")
CHATML = "{% for message in messages %}" + CHATML
ANSWERS = ["It adds two numbers.", "It adds three numbers.", "\nIt waits.", "Nothing: café, naïve."]
CHATS = [
    [
        {"role": "user", "content": f"What does f{i} do?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for i, answer in enumerate(ANSWERS * 6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA with SmolLM2's chat template, and conversations."""
    path = tmp_path_factory.mktemp("sft")
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([message["content"] for chat in CHATS for message in chat], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = SMOLLM2
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return path


def command(folder, output_dir, *options):
    return [
        *("--model", str(folder / "model"), "--dataset", str(folder / "chats.jsonl"), "--output_dir", str(output_dir)),
        *("--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--disable_tqdm", "true", "--osd_rank", "4"),
        *("--per_device_train_batch_size", "2", "--max_length", "192"),
        *options,
    ]


def trainer_of(argv):
    args, training_args = sft_trl.parse_arguments(argv)
    return sft_trl.build_trainer(args, training_args, sft_trl.TrainingClock())


@pytest.mark.parametrize("options", [(), ("--assistant_only_loss", "--packing")], ids=["plain", "answers, packed"])
def test_two_steps_end_to_end(options, folder, tmp_path, capsys):
    results = sft_trl.main(command(folder, tmp_path / "run", *options))
    written = tmp_path / "run"
    assert json.loads((written / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["steps"] == 2 and results["settings"]["optim"] == "osd_adamw8bit"
    assert results["settings"]["osd_rank"] == 4 and results["settings"]["packing"] == bool(options)
    assert results["settings"]["bf16"] is True  # trl's default survives the osd_ fields
    history = results["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))  # before, and after each step
    assert [entry["step"] for entry in history if "osd/pca_loss" in entry] == [1, 2]
    assert results["tokens_seen"] == history[-2]["eval_num_tokens"] > 0
    assert (written / "results.png").stat().st_size > 10_000
    table = (written / "results.md").read_text()
    assert f"| 2 | {losses[-1]:.3f} | {math.exp(losses[-1]):.2f} |" in table and table in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert tokenizer.chat_template == SMOLLM2  # without the marks, which are for training only
    LlamaForCausalLM.from_pretrained(written)


@pytest.mark.parametrize("template", [SMOLLM2, CHATML], ids=["smollm2", "chatml"])
def test_a_marked_template_renders_the_same_text(template, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    marked = chat_templates.training_template(tokenizer)
    assert "{% generation %}" in marked
    with_system = [{"role": "system", "content": "Be short."}, *CHATS[0]]
    for chat in (CHATS[2], CHATS[3], with_system, CHATS[0][:1]):
        for prompt in (False, True):
            plain, ours = (
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, chat_template=one)
                for one in (template, marked)
            )
            assert ours == plain


def test_the_loss_is_on_what_the_assistant_says_and_its_end(folder, tmp_path):
    trainer = trainer_of(command(folder, tmp_path, "--assistant_only_loss", "--validation_fraction", "0.25"))
    tokenizer = trainer.processing_class
    seen = set()
    for row in trainer.train_dataset:
        ids, labels = row["input_ids"], row["labels"]
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        # As generation will see it: everything before the first answer is the prompt of that conversation.
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert tokenizer.decode(ids[:start]).endswith("do?<|im_end|>\n<|im_start|>assistant\n")
        said = tokenizer.decode([label for label in labels if label != -100]).split("<|im_end|>")
        assert said[1:] == ["Yes.", ""]
        seen.add(said[0])
        header = tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert header not in labels and labels.count(tokenizer.eos_token_id) == 2
    assert seen == set(ANSWERS)


def test_packed_conversations_do_not_see_each_other(folder, tmp_path):
    options = ("--packing", "--max_length", "512", "--assistant_only_loss", "--bf16", "false")
    trainer = trainer_of(command(folder, tmp_path, *options))
    row = max(trainer.train_dataset, key=lambda row: len(row["seq_lengths"]))
    assert len(row["seq_lengths"]) > 1
    model = trainer.model.eval()
    with torch.no_grad():
        packed = trainer.compute_loss(model, dict(trainer.data_collator([row]))).item()
        total, count, start = 0.0, 0, 0
        for length in row["seq_lengths"]:
            ids, labels = (torch.tensor([row[key][start : start + length]]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            count += int((labels[0, 1:] != -100).sum())
            start += length
    assert packed == pytest.approx(total / count, abs=1e-5)  # float32, a sum of some hundred terms of size 6


def test_the_optimizer_and_the_arguments_are_what_was_asked_for(folder, tmp_path):
    options = ("--optim_target_modules", "q_proj", "--learning_rate", "1e-3", "--model_init_kwargs")
    trainer = trainer_of(command(folder, tmp_path, *options, '{"attn_implementation": "eager"}'))
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.args.gradient_checkpointing and trainer.args.lr_scheduler_type == "cosine"
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, OSD)
    group = optimizer.param_groups[0]
    assert group["rank"] == 4 and group["lr"] == 1e-3 and all("q_proj" in name for name in group["param_names"])


def write_gguf(path, model_folder) -> None:
    """What llama.cpp's converter writes, for a LLaMA with a byte-level BPE."""
    import gguf

    model, tokenizer = LlamaForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    config, merges = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(SMOLLM2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in heads:  # its rotary halves are interleaved
            value = value.view(heads[kind], 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model_that_trains(folder, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", folder / "model")
    gguf_file = ("--model", str(tmp_path), "--gguf_file", "tiny.gguf")
    trainer = trainer_of(command(folder, tmp_path / "run", *gguf_file, "--assistant_only_loss"))
    original = LlamaForCausalLM.from_pretrained(folder / "model")
    for key, value in original.named_parameters():
        assert torch.equal(trainer.model.get_parameter(key), value), key
    tokenizer = trainer.processing_class
    expected = AutoTokenizer.from_pretrained(folder / "model").apply_chat_template(CHATS[3])["input_ids"]
    assert tokenizer.apply_chat_template(CHATS[3])["input_ids"] == expected
    trainer.train()
    trainer.save_model()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "run")
    assert not hasattr(saved.config, "quantization_config")
    assert not torch.equal(saved.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)


def test_a_base_model_takes_the_template_of_another(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    argv = command(folder, tmp_path, "--model", str(tmp_path / "base"), "--assistant_only_loss")
    with pytest.raises(ValueError, match="no chat template: give --chat_template_path"):
        trainer_of(argv)
    trainer = trainer_of([*argv, "--chat_template_path", str(folder / "model")])
    assert trainer.processing_class.chat_template == SMOLLM2
    assert trainer.processing_class.eos_token == "<|im_end|>"
    labels = trainer.train_dataset[0]["labels"]
    assert labels.count(trainer.processing_class.eos_token_id) == 2 and -100 in labels


def test_unknown_templates_are_refused_with_the_way_out(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="--chat_template_path FILE.jinja"):
        chat_templates.training_template(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "--dtype must be float32 or bfloat16"),
        (("--max_eval_samples", "0"), "--max_eval_samples must be at least 1"),
        (("--validation_split", "dev"), "--validation_split dev: .* has no split but `train`"),
        (("--osd_rank", "0"), "rank"),
    ],
)
def test_wrong_options_are_refused(options, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(command(folder, tmp_path, *options))


def test_the_committed_run_is_its_table_and_its_loss_falls():
    report = sft_trl.Path(sft_trl.__file__).parent / "benchmarks" / "results" / "cpu_2_cores" / "sft_smollm2"
    results = json.loads(report.with_suffix(".json").read_text())
    assert report.with_suffix(".md").read_text() == sft_trl.results_table(results)
    losses = [entry["eval_loss"] for entry in results["log_history"] if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    assert results["settings"]["optim"] == "osd_adamw8bit" and results["parameters"] > 134e6


SOURCE = '''
class Box:
    """Holds whatever is put into it, in the order of arrival.

    Args: none
    """
    def put(self, x):
        """Puts ``x`` into the box, behind everything that is there already."""
    def _hidden(self):
        """This one is nobody's business but the class's own."""
def f():
    """.. note:: A directive is no prose, however long it may become."""
def g():
    """Too short."""
def h():
    """Puts ``x`` into the box, behind everything that is there already."""
'''


def test_questions_come_from_public_docstrings(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text(SOURCE)
    (tmp_path / "_private.py").write_text(SOURCE.replace("Holds", "Keeps"))
    (tmp_path / "template.py").write_text("def {{name}}(:\n")
    found = docstring_questions.collect_questions(tmp_path, "pack")
    assert [[message["content"] for message in chat] for chat in found] == [
        ["What is `pack.sub.Box` for?", "Holds whatever is put into it, in the order of arrival."],
        ["What does `pack.sub.Box.put` do?", "Puts `x` into the box, behind everything that is there already."],
    ]
    assert [message["role"] for message in found[0]] == ["user", "assistant"]
