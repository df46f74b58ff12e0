from itertools import chain

import pytest

from packing import collate_blocks, pack, tokenize, training_blocks, validation_blocks
from pretraining_data import load_text
from pretraining_tokenizer import MIN_VOCABULARY, leading_texts, train_byte_level_bpe, trained_tokenizer


LENGTH = 32


@pytest.fixture
def tokenizer(documents):
    return train_byte_level_bpe(documents, 320)


def flat(blocks):
    return list(chain.from_iterable(block["input_ids"] for block in blocks))


def test_pack_keeps_all_tokens_but_the_tail():
    rows = [{"input_ids": list(range(start, start + size))} for start, size in [(0, 3), (3, 0), (3, 20), (23, 6)]]
    blocks = list(pack(rows, 8))
    assert [len(block["input_ids"]) for block in blocks] == [8, 8, 8]
    assert flat(blocks) == list(range(24))  # 29 tokens; the tail of 5 is shorter than a block


def test_blocks_decode_to_the_documents_with_separators(jsonl_folder, documents, tokenizer):
    rows = tokenize(load_text(str(jsonl_folder)).train, "text", tokenizer)
    assert rows.column_names == ["input_ids"]
    tokens = flat(training_blocks(rows, LENGTH))
    assert sum(len(row) for row in rows["input_ids"]) - len(tokens) < LENGTH
    text = tokenizer.decode(tokens)
    whole = "".join(document + tokenizer.eos_token for document in documents[:250])
    assert whole.startswith(text)


def test_streamed_blocks_equal_map_style_blocks(jsonl_folder, tokenizer):
    splits = [load_text(str(jsonl_folder), streaming=streaming) for streaming in (False, True)]
    rows = [tokenize(split.validation, "text", tokenizer) for split in splits]
    prepared, streamed = (list(training_blocks(part, LENGTH)) for part in rows)
    assert prepared == streamed
    assert list(validation_blocks(rows[1], LENGTH, 10**6)) == prepared


def test_stream_changes_its_order_with_the_epoch_and_repeats_it(jsonl_folder, tokenizer):
    def first_tokens(epoch):
        stream = training_blocks(
            tokenize(load_text(str(jsonl_folder), streaming=True).train, "text", tokenizer), LENGTH
        )
        stream.set_epoch(epoch)
        return flat(stream)[:200]

    assert first_tokens(0) == first_tokens(0)
    assert first_tokens(0) != first_tokens(1)


def test_blocks_are_cached(jsonl_folder, tokenizer):
    files = []
    for _ in range(2):
        rows = tokenize(load_text(str(jsonl_folder)).train, "text", tokenizer)
        files.append([file["filename"] for data in (rows, training_blocks(rows, LENGTH)) for file in data.cache_files])
    assert files[0] == files[1] and len(files[0]) == 2


def test_validation_is_limited_and_too_short_text_refused(jsonl_folder, tokenizer):
    rows = tokenize(load_text(str(jsonl_folder)).validation, "text", tokenizer)
    assert len(validation_blocks(rows, LENGTH, 5 * LENGTH + 3)) == 5
    with pytest.raises(ValueError, match="--max_eval_tokens 31 is less than one block of 32"):
        validation_blocks(rows, LENGTH, 31)
    with pytest.raises(ValueError, match="validation text is shorter than one block: lower --sequence_length 100000"):
        validation_blocks(rows, 100_000, 10**6)
    with pytest.raises(ValueError, match="training text is shorter than one block"):
        training_blocks(rows, 100_000)


def test_collated_labels_equal_inputs():
    batch = collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2], [3, 4]]
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


def test_empty_documents_are_left_out(tmp_path, tokenizer, write_jsonl):
    path = write_jsonl(tmp_path / "all.jsonl", ["word", "", None, "word"] * 30)
    rows = tokenize(load_text(str(path), validation_fraction=0.5).validation, "text", tokenizer)
    assert all(len(row) > 1 for row in rows["input_ids"])


def test_trained_tokenizer_is_lossless_cached_and_refuses_small_vocabularies(jsonl_folder, tmp_path):
    train = load_text(str(jsonl_folder)).train
    tokenizer = trained_tokenizer(train, "text", 300)
    assert len(tokenizer) == 300
    text = "Unseen: naïve Ω\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    folders = list((tmp_path / "hf_home" / "hf_osd" / "tokenizers").iterdir())
    trained_tokenizer(train, "text", 300)
    assert list((tmp_path / "hf_home" / "hf_osd" / "tokenizers").iterdir()) == folders and len(folders) == 1
    with pytest.raises(ValueError, match=f"--train_tokenizer 100 is too small.*{MIN_VOCABULARY}"):
        trained_tokenizer(train, "text", 100)


def test_tokenizer_training_reads_a_bounded_text(jsonl_folder, documents):
    train = load_text(str(jsonl_folder)).train
    assert leading_texts(train, "text", 1) == documents[:1]
    assert leading_texts(train, "text", 10**9) == documents[:250]
