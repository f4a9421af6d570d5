"""The reference cache: keyed by all that changes a number and by nothing else, and whole after a kill."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.engine import ref_cache
from tandem.engine.ref_cache import RefCache, Source, fingerprint, pair_key, source_key
from tandem.errors import UserError

KEY: dict[str, Any] = {"model": "m", "ids": [[1, 2, 3], [1, 2, 4]], "scored": [1, 1], "dtype": "fp32", "ld_alpha": None}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape | heads | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"ids": [[1, 2, 3], [1, 2, 5]]},
        {"ids": [[1, 2], [1, 2, 4]]},
        {"scored": [2, 1]},
        {"dtype": "bf16"},
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.0},
    ],
)
def test_whatever_changes_the_number_changes_the_key(change: dict[str, Any]):
    assert pair_key(**KEY) == pair_key(**KEY)
    assert pair_key(**KEY | change) != pair_key(**KEY)


def test_the_fingerprint_sees_one_weight_and_the_configuration():
    model = llama()
    before = fingerprint(model)
    assert fingerprint(llama()) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(llama(rms_norm_eps=1e-4)) != before
    assert fingerprint(llama().to(torch.bfloat16)) != before


def test_an_adapter_counts_where_it_is_on():
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    assert fingerprint(model, adapter=False) == fingerprint(llama())
    before = fingerprint(model)
    assert before != fingerprint(llama())
    model.add_adapter("other", config)
    assert fingerprint(model) == before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter += 1
    assert fingerprint(model) == before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_an_adapters_settings_count(change: dict[str, Any]):
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}

    def adapted(**changes: Any) -> str:
        torch.manual_seed(0)
        return fingerprint(get_peft_model(llama(), LoraConfig(**settings | changes)))

    assert adapted() == adapted(base_model_name_or_path="elsewhere", target_modules=["v_proj", "q_proj"])
    assert adapted(**change) != adapted()


def test_a_source_is_known_by_its_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file put in another's place is another, though its size and date are the same."""
    llama().save_pretrained(tmp_path)
    (weights,) = files = [tmp_path / "model.safetensors"]
    assert source_key(llama(), Source(files)) is None  # written as the process runs: its dates may not tell
    monkeypatch.setattr(ref_cache, "STARTED", time.time() + 3600)
    key = source_key(llama(), Source(files))
    assert key is not None and key == source_key(llama(), Source(files))
    others = [
        source_key(llama(), Source(files, "bfloat16")),
        source_key(llama().to(torch.bfloat16), Source(files)),
        source_key(llama(rms_norm_eps=1e-4), Source(files)),
        source_key(get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2)), Source(files)),
    ]
    content, found = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    others.append(source_key(llama(), Source(files)))
    assert weights.stat().st_mtime_ns == found.st_mtime_ns and weights.stat().st_size == found.st_size
    assert len({key, *others}) == 6
    assert source_key(llama(), Source()) is None


@settings(deadline=None)  # a disk's
@given(st.lists(st.tuples(st.floats(-1e4, 0, width=32), st.floats(-1e4, 0, width=32)), max_size=700))
def test_values_come_back_bit_for_bit(values: list[tuple[float, float]]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cache = RefCache(folder)
        entries = {index.to_bytes(16, "big"): pair for index, pair in enumerate(values)}
        cache.write(entries)
        absent = b"x" * 16
        assert RefCache(folder).read([*entries, absent]) == entries


def test_what_is_there_stays_and_what_is_not_finite_is_not_kept(tmp_path: Path):
    cache = RefCache(tmp_path)
    cache.write({b"a": (-1.0, -2.0)})
    cache.write({b"a": (-9.0, -9.0), b"b": (float("nan"), -1.0), b"c": (-3.0, float("-inf"))})
    assert cache.read([b"a", b"b", b"c"]) == {b"a": (-1.0, -2.0)}


def test_a_file_that_is_no_cache_is_one_line(tmp_path: Path):
    (tmp_path / "log_probs.sqlite").write_bytes(b"not a database, and long enough to be read as one" * 10)
    with pytest.raises(UserError, match=r"--ref_cache: .*log_probs\.sqlite cannot be used"):
        RefCache(tmp_path)


def test_the_first_process_alone_opens_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert RefCache(tmp_path / "cache").path == tmp_path / "cache" / "log_probs.sqlite"
    assert not (tmp_path / "cache").exists()


def test_no_connection_stays_open(tmp_path: Path):
    cache = RefCache(tmp_path)
    cache.write({b"a": (-1.0, -2.0)})
    assert cache.read([b"a"])
    assert not [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


WRITER = """
import sys
from tandem.engine.ref_cache import RefCache
cache, who = RefCache(sys.argv[1]), int(sys.argv[2])
for batch in range(10_000):
    cache.write({f"{who}-{batch}-{i}".encode(): (-float(batch), -float(i)) for i in range(8)})
    print(batch, flush=True)
"""


def test_two_writers_killed_in_the_middle_leave_whole_batches(tmp_path: Path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(who)], stdout=subprocess.PIPE, text=True)
        for who in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    time.sleep(0.3)
    written = []
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        out, _ = writer.communicate()
        written.append(int(out.split()[-1]) if out else 0)
    cache = RefCache(tmp_path)
    for who, last in enumerate(written):
        for batch in range(last + 1):
            keys = [f"{who}-{batch}-{i}".encode() for i in range(8)]
            assert cache.read(keys) == {key: (-float(batch), -float(i)) for i, key in enumerate(keys)}
        torn = cache.read([f"{who}-{last + 1}-{i}".encode() for i in range(8)])
        assert len(torn) in (0, 8)  # the batch of the kill, and it is whole if it is there


def test_arrays_have_the_keys_of_lists():
    arrays = [np.array(row, np.int32) for row in KEY["ids"]]
    assert pair_key(**KEY | {"ids": arrays}) == pair_key(**KEY)
    assert pair_key(**KEY | {"scored": [np.array([1, 0], np.int32), 1]}) == pair_key(**KEY | {"scored": [[1, 0], 1]})


def test_a_writer_keeps_what_it_is_given_while_others_hold_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every few seconds, at the end, and where what fills it is broken off."""
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0.05)
    cache = RefCache(tmp_path)
    with contextlib.suppress(KeyError), cache.writer() as put:
        with contextlib.closing(sqlite3.connect(cache.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            for number in range(20):
                put({f"{number}".encode(): (-1.0, -float(number))})
            assert time.monotonic() - started < 1  # nothing waits for the lock, which is held for a minute
            other.rollback()
        until = time.monotonic() + 30
        while len(cache.read([b"3", b"19"])) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert cache.read([b"3", b"19"]) == {b"3": (-1.0, -3.0), b"19": (-1.0, -19.0)}
        put({b"last": (-2.0, -2.0)})
        raise KeyError
    assert cache.read([b"last"]) == {b"last": (-2.0, -2.0)}


def test_a_writer_tells_what_it_could_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0.02)
    cache = RefCache(tmp_path)
    cache.path.write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot be used"), cache.writer() as put:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            put({b"a": (-1.0, -1.0)})
            time.sleep(0.01)
    assert time.monotonic() < until
