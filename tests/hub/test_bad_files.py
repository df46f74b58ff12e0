"""Every damaged, inconsistent or hostile file is refused with one sentence, and nothing is loaded or changed."""

import struct

import pytest
import torch
from damage import (
    CONFIG,
    DATA,
    INDEX,
    SHARDS,
    a_folder,
    config,
    data,
    edit,
    entry,
    from_another_save,
    gone,
    header,
    index,
    nan,
    overlap,
    raw_header,
    renamed,
    save,
    swap,
    tensors,
    text,
    top,
    weight_map,
)

from hf_osd.hub import ProjectionFileError, ProjectionState


ONE_FILE = {
    # the set
    "no config": (gone(CONFIG), "osd_config.json is missing in .* interrupted"),
    "no data": (gone(DATA), "osd_projection.safetensors is missing"),
    "data is a folder": (a_folder, "osd_projection.safetensors in .* is missing"),
    "another save's data": (from_another_save(DATA), "does not have the sha256"),
    "truncated": (data(lambda c: c[:-5], sealed=False), r"osd_config.json says \d+: it is truncated or"),
    "one bit": (data(lambda c: c[:-1] + bytes([c[-1] ^ 1]), sealed=False), "does not have the sha256"),
    # the config
    "empty config": (text(b""), "osd_config.json in .* is not JSON"),
    "not JSON": (text(b"{'a': 1}"), "is not JSON"),
    "not UTF-8": (text(b'{"a": "\xff"}'), "is not JSON: .*utf-8"),
    "not an object": (text(b"[1]"), "is not a JSON object, but a list"),
    "deep": (text(b"[" * 100_000), "is not JSON"),
    "NaN in JSON": (text(b'{"format_version": NaN}'), "is not JSON: it holds NaN"),
    "key twice": (text(b'{"format_version": 1, "format_version": 1}'), "the key 'format_version' twice"),
    "no version": (config(lambda c: c.pop("format_version")), "format_version None, expected 1 to 2"),
    "newer version": (top(format_version=3), "format_version 3, newer than 2: update hf_osd"),
    "version 0": (top(format_version=0), "format_version 0, expected 1"),
    "version true": (top(format_version=True), "format_version True, expected 1"),
    "version text": (top(format_version="1"), "format_version '1', expected 1"),
    "rule not text": (top(weight_rule=[1]), r"'weight_rule' in .* must be of type str or null, got \[1\]"),
    "alpha not a number": (top(alpha="5"), "'alpha' in .* must be of type float or null"),
    "step not an integer": (top(step=1.5), "'step' in .* must be of type int or null"),
    "huge step": (top(step=10**30), "'step' in .* must be of type int or null"),
    "betas": (top(betas=[0.9, None]), "'betas' in .* must be a list of numbers"),
    "no parameters": (top(parameters={}), "has no 'parameters'"),
    "parameters not an object": (top(parameters=["a.weight"]), "has no 'parameters'"),
    "entry not an object": (config(lambda c: c["parameters"].update({"a.weight": 3})), "entry of a.weight .* object"),
    "side unknown": (entry(side="up"), "has the side 'up', expected left or right"),
    "side not text": (entry(side=["left"]), r"has the side \['left'\]"),
    "other side": (entry(side="right"), r"P of a.weight .* has the shape \(6, 3\), expected \(10, 3\): right side"),
    "rank too large": (entry(rank=7), r"has the rank 7, larger than its matrix \(6, 10\)"),
    "rank 0": (entry(rank=0), "has the rank 0, expected a positive integer"),
    "rank not an integer": (entry(rank=3.0), "has the rank 3.0, expected a positive integer"),
    "other rank": (entry(rank=2), r"has the shape \(6, 3\), expected \(6, 2\)"),
    "other shape": (entry(shape=[7, 10]), r"has the shape \(6, 3\), expected \(7, 3\)"),
    "absurd shape": (entry(shape=[6, 10**18]), r"has the shape \[6, 10+\], expected \[m, n\]"),
    "negative shape": (entry(shape=[-6, 10]), r"has the shape \[-6, 10\]"),
    "shape of a vector": (entry(shape=[6]), r"has the shape \[6\], expected \[m, n\]"),
    "shape not a list": (entry(shape="6x10"), "has the shape '6x10'"),
    "moments not names": (entry(moments=[{"a": 1}]), "the moments of a.weight .* different names"),
    "moments twice": (entry(moments=["exp_avg", "step", "step"]), "the moments of a.weight .* different names"),
    "moments with paths": (entry(moments=["exp_avg", "../step"]), "the moments of a.weight .* different names"),
    "name is a path": (renamed("../../a.weight"), r"parameter name '../../a.weight' .* has `..` or control"),
    "name of no tensor": (renamed("/etc/a"), "has no tensor '/etc/a'"),
    "name with a control character": (renamed("a\x1b[2J"), "has `..` or control characters"),
    "name that cannot be encoded": (renamed("a\ud800"), "has `..` or control characters"),
    "name is empty": (renamed(""), "is empty or longer"),
    "name is long": (renamed("a" * 2000), "is empty or longer"),
    "name is reserved": (renamed("__metadata__"), "is reserved"),
    "holder unknown": (entry(holder="z"), "a.weight .* has the holder 'z', which is no parameter there"),
    "holder not text": (entry(holder=["b.weight"]), "which is no parameter there"),
    "holder is itself": (entry(holder="a.weight"), "has the holder a.weight, which holds no P of its own"),
    "holder of another P": (entry(holder="c.weight"), r"P of shape \(6, 3\), but its holder c.weight one of \(8, 2\)"),
    "holder and P": (entry(holder="b.weight"), "has the extra 'a.weight'"),
    "no files": (config(lambda c: c.pop("files")), "has no 'files'"),
    "files path": (top(files={"../x.safetensors": {}}), "lists the file '../x.safetensors', which is no name"),
    "files pickle": (top(files={"osd_projection.bin": {}}), "lists the file 'osd_projection.bin', which is no name"),
    "no size": (config(lambda c: c["files"][DATA].pop("size")), "does not give the size and sha256"),
    "no sha256": (config(lambda c: c["files"][DATA].pop("sha256")), "does not give the size and sha256"),
    "sha256 of another kind": (config(lambda c: c["files"][DATA].update(sha256="abc")), "does not give the size and"),
    "absurd size": (config(lambda c: c["files"][DATA].update(size=10**10)), "osd_config.json says 10000000000"),
    # the header, in files that the config vouches for
    "seven bytes": (data(lambda c: c[:7]), "is truncated or no safetensors file"),
    "cut in the header": (data(lambda c: c[:30]), "is truncated or no safetensors file"),
    "cut in the data": (data(lambda c: c[:-8]), r"holds \d+ bytes of data, its header describes \d+"),
    "trailing bytes": (data(lambda c: c + b"x" * 8), r"holds \d+ bytes of data, its header describes \d+"),
    "header of 10 GB": (data(lambda c: struct.pack("<Q", 10**10) + c[8:]), "header claims 10000000000 bytes"),
    "header of 2^64 bytes": (data(lambda c: b"\xff" * 8 + c[8:]), "header claims 18446744073709551615 bytes"),
    "a pickle": (data(lambda c: b"\x80\x04\x95" + c), "is truncated or no safetensors file"),
    "header not JSON": (raw_header(b"{'a': 1}"), "the header of .* is not JSON"),
    "header not an object": (raw_header(b"[]"), "the header of .* is not a JSON object"),
    "header with a key twice": (raw_header(b'{"a": 1, "a": 2}'), "the header of .* has the key 'a' twice"),
    "tensor not an object": (header(lambda h: h.update({"a.weight": 1})), "'a.weight' .* is not described by dtype"),
    "unknown dtype": (header(lambda h: h["a.weight"].update(dtype="F128")), "has the dtype 'F128', expected one of"),
    "negative size": (header(lambda h: h["a.weight"].update(shape=[-6, -3])), r"has the shape \[-6, -3\]"),
    "overflowing size": (header(lambda h: h["a.weight"].update(shape=[2**31 - 1] * 4)), r"its shape needs \d{30,}"),
    "offsets not integers": (header(lambda h: h["a.weight"].update(data_offsets=["0", "72"])), "two integers"),
    "offsets overlap": (header(overlap), "the tensors in .* overlap at byte"),
    "a gap": (header(lambda h: h.pop("b.weight")), "leave a gap at byte|its header describes"),
    "shape against offsets": (header(lambda h: h["a.weight"].update(shape=[6, 4])), "spans 72 bytes, its .* needs 96"),
    # the tensors
    "P missing": (tensors(lambda t: t.pop("b.weight")), "has no tensor 'b.weight'"),
    "moment missing": (tensors(lambda t: t.pop("a.weight::step")), "has no tensor 'a.weight::step'"),
    "extra tensor": (tensors(lambda t: t.update(z=torch.zeros(2))), "has the extra 'z'"),
    "wrong shape": (tensors(lambda t: t.update({"b.weight": torch.zeros(3, 6)})), r"has the shape \(3, 6\)"),
    "vector for P": (tensors(lambda t: t.update({"b.weight": torch.zeros(18)})), r"has the shape \(18,\)"),
    "codes for P": (tensors(lambda t: t.update({"b.weight": t["b.weight"].byte()})), "has the dtype U8, expected one"),
    "integers for P": (tensors(lambda t: t.update({"b.weight": t["b.weight"].long()})), "has the dtype 'I64'"),
    "half P": (tensors(lambda t: t.update({"b.weight": t["b.weight"].half()})), "has the dtype 'F16'"),
    "huge moment": (tensors(lambda t: t.update({"a.weight::step": torch.zeros(9, 9)})), "which no state entry"),
    "NaN": (tensors(lambda t: nan(t["b.weight"])), "P of b.weight has values that are not finite"),
    "NaN in bfloat16": (tensors(lambda t: t["c.weight"].fill_(torch.nan)), "P of c.weight .* not finite"),
    "infinity": (tensors(lambda t: t["b.weight"].fill_(torch.inf)), "P of b.weight has values that are not finite"),
    "NaN in a moment": (tensors(lambda t: nan(t["a.weight::exp_avg"])), "exp_avg of a.weight has values that are not"),
}  # fmt: skip


SHARDED = {
    "no index": (gone(INDEX), "index.json is missing"),
    "shard missing": (gone(SHARDS[1]), "osd_projection-00002-of-00003.safetensors is missing"),
    "shard not listed": (config(lambda c: c["files"].pop(SHARDS[1])), "lists an incomplete set of files"),
    "index not listed": (config(lambda c: c["files"].pop(INDEX)), "lists an incomplete set of files"),
    "one file and shards": (config(lambda c: c["files"].update({DATA: c["files"][INDEX]})), "incomplete set of files"),
    "index alone": (config(lambda c: [c["files"].pop(name) for name in SHARDS]), "lists an incomplete set of files"),
    "shard swapped": (config(swap), "does not have the sha256|belongs to another save"),
    "shard of another save": (from_another_save(SHARDS[2]), "does not have the sha256"),
    "shard truncated": (data(lambda c: c[:-1], SHARDS[0], sealed=False), "00001-of-00003.safetensors .* is truncated"),
    "index path": (weight_map(b_weight="../x.safetensors"), "names the file '../x.safetensors', which .* not list"),
    "index absolute path": (weight_map(b_weight="/x.safetensors"), "names the file '/x.safetensors', which .* not"),
    "index not text": (weight_map(b_weight=[SHARDS[0]]), "names the file .* which osd_config.json does not list"),
    "index unknown shard": (weight_map(b_weight="osd_projection-00004-of-00004.safetensors"), "does not list"),
    "index wrong shard": (weight_map(c_weight=SHARDS[0]), "says that 'c.weight' is in .*, which does not have it"),
    "index extra key": (weight_map(z=SHARDS[0]), "says that 'z' is in .*, which does not have it"),
    "index missing key": (index(lambda i: i["weight_map"].pop("b.weight")), "does not list 'b.weight'"),
    "index without map": (index(lambda i: i.pop("weight_map")), "has no weight_map"),
    "index map is a list": (index(lambda i: i.update(weight_map=[])), "has no weight_map"),
    "index without size": (index(lambda i: i.pop("metadata")), "has no weight_map and metadata"),
    "index wrong size": (index(lambda i: i["metadata"].update(total_size=1)), "has total_size 1, the files hold"),
    "index not JSON": (data(lambda c: c[:-5], INDEX), "index.json in .* is not JSON"),
    "index key twice": (data(lambda c: c.replace(b'"c.weight"', b'"b.weight"'), INDEX), "the key 'b.weight' twice"),
    "tensor in two shards": (tensors(lambda t: t.update({"a.weight": torch.zeros(6, 3)}), SHARDS[2]), "in two files"),
    "tensor in no shard": (tensors(lambda t: t.pop("c.weight"), SHARDS[2]), "is in .*, which does not have it"),
}  # fmt: skip


CASES = [
    (size, bad, words, name)
    for size, cases in (("5GB", ONE_FILE), (140, SHARDED))
    for name, (bad, words) in cases.items()
]


@pytest.mark.parametrize(("size", "bad", "words"), [pytest.param(*case[:3], id=case[3]) for case in CASES])
def test_it_is_refused_with_one_sentence(size, bad, words, tmp_path, monkeypatch):
    save(tmp_path, size)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({CONFIG, DATA} if size == "5GB" else {CONFIG, INDEX, *SHARDS})
    assert len(ProjectionState.from_pretrained(tmp_path)) == 3  # the control: the set is good before
    bad(tmp_path)
    with pytest.raises(ProjectionFileError, match=words) as caught:
        ProjectionState.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 3000 and message.endswith(".")


def test_a_file_that_is_too_large_for_json_is_not_read(tmp_path):
    save(tmp_path, "5GB")
    with open(tmp_path / CONFIG, "r+b") as file:
        file.truncate(10**9)  # sparse: takes no room
    with pytest.raises(ProjectionFileError, match="is larger than 100 MB"):
        ProjectionState.from_pretrained(tmp_path)


def test_links_are_followed_as_in_the_cache(tmp_path):
    save(tmp_path / "blobs", "5GB")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, DATA):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert len(ProjectionState.from_pretrained(tmp_path / "snapshot")) == 3


def test_stray_files_of_other_sets_do_not_matter(tmp_path):
    save(tmp_path, "5GB")
    (tmp_path / SHARDS[0]).write_bytes(b"left over")
    (tmp_path / "osd_projection.bin").write_bytes(b"\x80\x04")
    assert len(ProjectionState.from_pretrained(tmp_path)) == 3


def test_unknown_notes_in_the_config_are_kept(tmp_path):
    save(tmp_path, "5GB")
    edit(tmp_path / CONFIG, lambda value: value.update(note="from the third run"))
    state = ProjectionState.from_pretrained(tmp_path)
    state.save_pretrained(tmp_path / "again")
    assert ProjectionState.from_pretrained(tmp_path / "again").config["note"] == "from the third run"
