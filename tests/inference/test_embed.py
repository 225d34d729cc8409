"""embed_file: right vectors, resumed with the same bytes, refusals before any work."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_fast.inference import EncoderSettings, embed_file, load_model
from moe_fast.inference.text_encoder import TextEncoder

TEXTS = [f"w{i % 50} w{(7 * i) % 50} w{i % 11}" for i in range(60)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    rows = [
        {"id": f"t{i}", "text": text, "domain": ("law", "medicine")[i % 2]}
        for i, text in enumerate(TEXTS)
    ]
    return write(tmp_path / "texts.jsonl", rows)


def settings(models, **changes):
    return EncoderSettings(
        **{"model": str(models / "moe"), "domain": "law", "device": "cpu"} | changes
    )


def embed(source, output, settings, **options):
    return embed_file(source, output, settings, **{"progress": False, "chunk_size": 16} | options)


def test_npy_holds_what_encode_gives(models, texts, tmp_path):
    done = embed(texts, tmp_path / "v.npy", settings(models))
    expected = load_model(str(models / "moe"), device="cpu").encode(TEXTS, domain="law")
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    assert (done.rows, done.dimension, done.resumed_rows) == (60, 32, 0)
    assert not (tmp_path / "v.npy.parts").exists()


def test_parquet_holds_ids_and_lists(models, texts, tmp_path):
    embed(texts, tmp_path / "v.npy", settings(models))
    embed(texts, tmp_path / "v.parquet", settings(models))
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column("id").to_pylist() == [f"t{i}" for i in range(60)]
    rows = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_array_equal(rows, np.load(tmp_path / "v.npy"))


def test_a_domain_per_text(models, texts, tmp_path):
    embed(texts, tmp_path / "v.npy", settings(models, domain=None), domain_column="domain")
    model = load_model(str(models / "moe"), device="cpu")
    expected = model.encode(TEXTS, domain=["law", "medicine"] * 30)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - model.encode(TEXTS, domain="law")).max() > 1e-3


def test_settings_reach_the_vectors(models, texts, tmp_path):
    changes = {"normalize": True, "dtype": "float16", "prompt_name": "query"}
    embed(texts, tmp_path / "v.npy", settings(models, **changes))
    model = load_model(str(models / "moe"), device="cpu")
    options = {"domain": "law", "normalize_embeddings": True, "prompt_name": "query"}
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, model.encode(TEXTS, **options), rtol=0, atol=1e-3)


def test_rows_that_cannot_be_read_are_left_out_once_it_is_said(models, tmp_path, caplog):
    source = write(
        tmp_path / "t.jsonl", [{"key": f"k{i}", "text": "w1" * (i != 1)} for i in range(4)]
    )
    options = {"id_column": "key", "skip_invalid": True, "chunk_size": 2}
    found = embed(source, tmp_path / "v.npy", settings(models), **options)
    assert found.rows == 3 and np.load(tmp_path / "v.npy").shape[0] == 3
    ids = (tmp_path / "v.npy.ids.jsonl").read_text().split()
    assert ids == ['"k0"', '"k2"', '"k3"']
    assert caplog.text.count("1 invalid rows skipped: line 2: text is empty") == 1
    write(source, [{"key": "k1", "text": ""}])
    with pytest.raises(ValueError, match="no texts in this file .1 invalid rows skipped"):
        embed(source, tmp_path / "w.npy", settings(models), **options)


def test_a_dense_model_and_a_text_file(models, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    embed(
        tmp_path / "texts.txt",
        tmp_path / "v.npy",
        settings(models, model=str(models / "model"), domain=None),
    )
    expected = load_model(str(models / "model"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=0, atol=1e-6)


# --- interruption --------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, after):
    """The next embed_file ends after so many chunks, as a kill between chunks would end it."""
    from moe_fast.inference.parts import Parts

    written = []
    write_chunk = Parts.write

    def count(self, *args):
        if len(written) == after:
            raise Interrupted
        written.append(args[0])
        write_chunk(self, *args)

    monkeypatch.setattr(Parts, "write", count)
    return written


def test_goes_on_where_it_stopped(models, texts, tmp_path, monkeypatch):
    output = tmp_path / "v.npy"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, output, settings(models))
    assert not output.exists()
    with monkeypatch.context() as patch:
        written = interrupt(patch, after=100)
        done = embed(texts, output, settings(models))
    assert written == [2, 3] and done.resumed_rows == 32
    whole = tmp_path / "whole.npy"
    embed(texts, whole, settings(models))
    assert output.read_bytes() == whole.read_bytes()


def test_a_damaged_chunk_is_computed_again(models, texts, tmp_path, monkeypatch):
    output = tmp_path / "v.npy"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, output, settings(models))
    chunk = next(output.with_name("v.npy.parts").glob("00000001-*.npy"))
    chunk.write_bytes(chunk.read_bytes()[:40])
    assert embed(texts, output, settings(models)).resumed_rows == 16


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"normalize": True}, {}, r"normalize \(False then, True now\)"),
        ({"domain": "medicine"}, {}, r"domain \('law' then, 'medicine' now\)"),
        ({"model": "model", "domain": None}, {}, r"domain .*, model\."),
        ({}, {"chunk_size": 8}, r"chunk_size \(16 then, 8 now\)"),
        ({}, {"threads": 7}, r"threads \(1 then, 7 now\)"),
    ],
)
def test_refuses_to_mix_two_runs(changes, options, named, models, texts, tmp_path, monkeypatch):
    output = tmp_path / "v.npy"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, output, settings(models), threads=1)
    if "model" in changes:
        changes = changes | {"model": str(models / changes["model"])}
    with pytest.raises(FileExistsError, match=rf"v\.npy\.parts holds the chunks.*{named}"):
        embed(texts, output, settings(models, **changes), **options)
    done = embed(texts, output, settings(models, **changes), overwrite=True, **options)
    assert done.resumed_rows == 0


def test_refuses_a_source_that_changed(models, texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, tmp_path / "v.npy", settings(models))
    texts.write_text(texts.read_text().replace("w1 w7", "w2 w7"))
    with pytest.raises(FileExistsError, match="differs from this one in source"):
        embed(texts, tmp_path / "v.npy", settings(models))


def test_the_threads_of_the_interrupted_run_are_kept(models, texts, tmp_path, monkeypatch):
    """So that going on without saying how many gives the same bytes."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, tmp_path / "v.npy", settings(models), threads=3)
    assert embed(texts, tmp_path / "v.npy", settings(models)).resumed_rows == 32


def test_too_long_texts_can_be_cut_in_a_resumed_run(models, tmp_path):
    rows = [{"text": text} for text in TEXTS[:40]] + [{"text": "w1 " * 40}]
    source = write(tmp_path / "texts.jsonl", rows)
    with pytest.raises(ValueError, match=r"texts from .*texts.jsonl, line 33: .*at most.*= 32 tok"):
        embed(source, tmp_path / "v.npy", settings(models))
    done = embed(source, tmp_path / "v.npy", settings(models, truncate=True))
    assert (done.rows, done.resumed_rows) == (41, 32)


def test_a_dense_model_does_not_cut_texts_in_silence(models, tmp_path, caplog):
    source = write(tmp_path / "texts.jsonl", [{"text": "w1 " * 40}, {"text": "w1"}])
    dense = settings(models, model=str(models / "model"), domain=None)
    with pytest.raises(ValueError, match="at most max_seq_length = 32 .*text 0 has 42"):
        embed(source, tmp_path / "v.npy", dense)
    dense = settings(models, model=str(models / "model"), domain=None, truncate=True)
    embed(source, tmp_path / "v.npy", dense)
    assert "1 of 2 texts are longer than max_seq_length = 32" in caplog.text


# --- what is not ours, and two at once -----------------------------------------------------------


def test_a_second_run_is_refused(models, texts, tmp_path, monkeypatch):
    """Also with overwrite, and whatever it would embed."""
    output, other = tmp_path / "v.npy", write(tmp_path / "other.jsonl", [{"text": "w9"}] * 60)
    refused = []

    def meanwhile(number):
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match=r"v\.npy is being written by another run"):
                embed(other, output, settings(models), overwrite=overwrite)
            refused.append(number)

    with monkeypatch.context() as patch:
        at_each_chunk(patch, meanwhile)
        embed(texts, output, settings(models))
    assert refused == [0, 0, 1, 1, 2, 2, 3, 3]
    whole = tmp_path / "whole.npy"
    embed(texts, whole, settings(models))
    assert output.read_bytes() == whole.read_bytes()


def at_each_chunk(monkeypatch, act):
    from moe_fast.inference.parts import Parts

    write_chunk = Parts.write

    def write(self, number, *args):
        monkeypatch.setattr(Parts, "write", write_chunk)
        act(number)
        monkeypatch.setattr(Parts, "write", write)
        write_chunk(self, number, *args)

    monkeypatch.setattr(Parts, "write", write)


def test_rows_are_not_mixed_where_there_are_no_locks(models, texts, tmp_path, monkeypatch):
    """A run that another one discards the chunks of ends with an error, or with its own rows."""
    from moe_fast.inference import embed as module

    monkeypatch.setattr(module, "exclusive", lambda path: contextlib.nullcontext())
    output = tmp_path / "v.npy"
    other = write(tmp_path / "other.jsonl", [{"text": f"w{i % 9} w3"} for i in range(60)])

    def intrude(number):
        if number == 2:
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                interrupt(patch, after=2)
                embed(other, output, settings(models), overwrite=True)

    with monkeypatch.context() as patch:
        at_each_chunk(patch, intrude)
        with pytest.raises(FileNotFoundError, match="00000000-"):
            embed(texts, output, settings(models))
    assert not output.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_refused_and_kept(models, texts, tmp_path, overwrite):
    precious = tmp_path / "v.npy.parts" / "thesis" / "only-copy.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years")
    (tmp_path / "v.npy.parts" / "manifest.json").write_text('{"mine": 1}')
    with pytest.raises(
        FileExistsError, match=r"v\.npy\.parts is where .*'manifest.json', 'thesis'"
    ):
        embed(texts, tmp_path / "v.npy", settings(models), overwrite=overwrite)
    assert precious.read_text() == "years"
    assert (tmp_path / "v.npy.parts" / "manifest.json").read_text() == '{"mine": 1}'


def test_a_file_of_others_among_ours_is_kept(models, texts, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, tmp_path / "v.npy", settings(models))
    (tmp_path / "v.npy.parts" / "notes.txt").write_text("mine")
    embed(texts, tmp_path / "v.npy", settings(models))
    assert os.listdir(tmp_path / "v.npy.parts") == ["notes.txt"]
    assert "holds files of others (notes.txt)" in caplog.text


@pytest.mark.parametrize("begun", [False, True], ids=["before the clean-up", "within it"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_killed_before_the_end_of_the_clean_up(begun, suffix, models, texts, tmp_path, monkeypatch):
    """The same command ends the clean-up; another one, or another output, is no end of it."""
    from moe_fast.inference import parts

    output = tmp_path / f"v{suffix}"

    def die(folder):
        if begun:
            next(folder.glob("*.npy")).unlink()
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(parts, "_remove_ours", die)
        embed(texts, output, settings(models))
    content, kept = output.read_bytes(), output.with_name("kept")
    with pytest.raises(FileExistsError, match="differs from this one in normalize"):
        embed(texts, output, settings(models, normalize=True))
    os.rename(output, kept)
    output.write_bytes(content[:-1])
    with pytest.raises(FileExistsError, match=rf"v{suffix} exists already and is kept"):
        embed(texts, output, settings(models))
    os.replace(kept, output)
    assert embed(texts, output, settings(models)).resumed_rows == 60
    assert output.read_bytes() == content
    assert not output.with_name(f"{output.name}.parts").exists()


def test_killed_before_what_belongs_to_the_output_is_written(models, texts, tmp_path):
    """The same command writes it, and is not told that the output exists."""
    output, settings_file = tmp_path / "v.npy", tmp_path / "v.npy.yaml"

    def die():
        raise Interrupted

    with pytest.raises(Interrupted):
        embed(texts, output, settings(models), finish=die)
    content = output.read_bytes()
    again = embed(texts, output, settings(models), finish=lambda: settings_file.write_text("x"))
    assert again.resumed_rows == 60 and settings_file.read_text() == "x"
    assert output.read_bytes() == content
    with pytest.raises(FileExistsError, match=r"v\.npy exists already"):
        embed(texts, output, settings(models))


def test_an_absurd_number_of_threads_is_refused(models, texts, tmp_path, monkeypatch):
    most = 4 * os.cpu_count()
    for name in ("threads", "processes"):
        with pytest.raises(ValueError, match=rf"{name} must be at most {most}, .*got 100000"):
            embed(texts, tmp_path / "v.npy", settings(models), **{name: 100_000})
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, after=2)
        embed(texts, tmp_path / "v.npy", settings(models))
    manifest = tmp_path / "v.npy.parts" / "manifest.json"
    for planted in (100_000, "many", None, True):
        content = json.loads(manifest.read_text()) | {"threads": planted}
        manifest.write_text(json.dumps(content))
        with pytest.raises((ValueError, TypeError), match=r"manifest\.json: threads must be"):
            embed(texts, tmp_path / "v.npy", settings(models))


# --- SIGKILL -------------------------------------------------------------------------------------


def run_until_killed(arguments, parts, chunks, kill=os.killpg):
    """Start the command line and kill it when so many new chunks are there; ``None``: never."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_fast.cli", "embed", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    before = len(list(parts.glob("*.npy")))
    while process.poll() is None:
        if chunks is not None and len(list(parts.glob("*.npy"))) >= before + chunks:
            kill(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    wait_for_the_end_of_group(process.pid)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.03, 0.1])
def test_of_two_at_once_one_wins(delay, models, tmp_path):
    """Two real processes, of different sources, on one output."""
    count, output = 2_000, tmp_path / "v.npy"
    sources = [
        write(
            tmp_path / f"{name}.jsonl", [{"id": f"{name}{i}", "text": "w1"} for i in range(count)]
        )
        for name in ("one", "two")
    ]
    arguments = ["-o", output, "--domain", "law", "--threads", 1, "--device", "cpu", "--quiet"]
    processes = []
    for source in sources:
        line = [sys.executable, "-m", "moe_fast.cli", "embed", models / "moe", source, *arguments]
        processes.append(subprocess.Popen([*map(str, line)], stderr=subprocess.PIPE, text=True))
        time.sleep(delay)
    said = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], said
    winner, loser = codes.index(0), codes.index(1)
    refusals = ("v.npy is being written by another run", "v.npy exists already")  # if late
    assert any(refusal in said[loser] for refusal in refusals), said
    ids = [json.loads(line) for line in (tmp_path / "v.npy.ids.jsonl").read_text().splitlines()]
    assert ids == [f"{('one', 'two')[winner]}{i}" for i in range(count)]
    assert len(np.load(output)) == count
    kept = {"one.jsonl", "two.jsonl", "v.npy", "v.npy.ids.jsonl", "v.npy.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def wait_for_the_end_of_group(group, seconds=60):
    """A worker that outlived its parent would keep the group alive."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        pytest.fail(f"processes of group {group} are still there after {seconds} s")


def test_kills_and_the_same_bytes(models, tmp_path):
    """One process writes what two write, of which the parent alone was killed, and all before."""
    rng, count = random.Random(0), 2_000
    texts = [
        " ".join(f"w{rng.randrange(50)}" for _ in range(rng.randrange(1, 8))) for _ in range(count)
    ]
    source = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    chunk = count // 50
    whole, killed = tmp_path / "whole.npy", tmp_path / "killed.npy"
    embed(source, whole, settings(models), chunk_size=chunk, threads=1)
    arguments = [models / "moe", source, "-o", killed, "--domain", "law", "--chunk-size", chunk]
    arguments += ["--threads", 1, "--device", "cpu", "--processes"]
    parts = killed.with_name(killed.name + ".parts")
    for processes, kill in [(1, os.killpg), (2, os.kill)]:
        found = len(list(parts.glob("*.npy")))
        ended = run_until_killed([*arguments, processes], parts, rng.randrange(1, 8), kill)
        assert ended == -signal.SIGKILL
        assert len(list(parts.glob("*.npy"))) > found and not killed.exists()
    assert run_until_killed([*arguments, 2], parts, None) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    assert len(np.load(whole)) == count


def test_a_dead_worker_is_named(models, texts, tmp_path, monkeypatch):
    """And what the others had finished is kept."""
    from moe_fast.inference import workers

    monkeypatch.setattr(workers, "_start", _die)
    with pytest.raises(RuntimeError, match="a worker process died .*run again to go on"):
        embed(texts, tmp_path / "v.npy", settings(models), processes=2)


def _die(*arguments):
    os._exit(9)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "w1"}, {"body": "w2"}], r"line 2: column 'text' is missing.*\['body'\]"),
        ([{"text": "w1"}, {"text": " "}], "line 2: text is empty"),
        ([], "no texts in this file"),
    ],
)
def test_the_whole_file_is_checked_before_anything_is_written(rows, message, models, tmp_path):
    source = write(tmp_path / "texts.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        embed(source, tmp_path / "v.npy", settings(models))
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl"}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"domain": "art"}, {}, r"domain must be one of the model's \(law, medicine\); got 'art'"),
        ({"domain": None}, {}, "domain must be given: the model routes by domain"),
        ({}, {"domain_column": "domain"}, "give domain or domain_column, not both"),
        ({"prompt_name": "title"}, {}, "prompt_name must be one of .*got 'title'"),
        ({"batch_size": 0}, {}, "batch_size"),
        ({"dtype": "int8"}, {}, "dtype must be one of .*float16.*got 'int8'"),
        ({}, {"processes": 0}, "processes"),
    ],
)
def test_settings_are_checked_before_anything_is_written(
    changes, options, message, models, texts, tmp_path
):
    with pytest.raises(ValueError, match=message):
        embed(texts, tmp_path / "v.npy", settings(models, **changes), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl"}


def test_output_formats(models, texts, tmp_path):
    with pytest.raises(ValueError, match=r"v.csv: .*formats .npy and .parquet; got '.csv'"):
        embed(texts, tmp_path / "v.csv", settings(models))


def test_no_such_model(models, texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        embed(texts, tmp_path / "v.npy", settings(models, model=str(tmp_path / "none")))


def tokenizing_threads():
    return [t for t in threading.enumerate() if t.name.startswith("moe_fast_tokenize")]


def test_tokenizing_ahead_changes_nothing(models, texts, tmp_path, monkeypatch):
    """The same bytes as with tokens made chunk by chunk, and no thread is left."""
    embed(texts, tmp_path / "ahead.npy", settings(models))
    assert not tokenizing_threads()
    monkeypatch.setattr(TextEncoder, "tokenize", lambda self, texts: None)
    embed(texts, tmp_path / "chunk by chunk.npy", settings(models))
    assert (tmp_path / "ahead.npy").read_bytes() == (tmp_path / "chunk by chunk.npy").read_bytes()


def test_an_error_of_the_tokenizer_comes_in_its_chunks_turn(models, tmp_path):
    """The chunks before it are kept, the error names the chunk, and no thread is left."""
    rows = [{"text": "w1 w2"} for _ in range(40)]
    rows[20]["text"] = "w1 " * 500
    source, output = write(tmp_path / "t.jsonl", rows), tmp_path / "v.npy"
    with pytest.raises(ValueError, match=r"in the 16 texts from .*line 17.*: texts must have"):
        embed(source, output, settings(models))
    assert not tokenizing_threads()
    kept = sorted(path.name for path in (tmp_path / "v.npy.parts").iterdir())
    assert sum("0" in name and name.endswith(".npy") for name in kept) == 1, kept
