"""embed_corpus without a cluster: the jobs run in this process, one row group after the other."""

import contextlib
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

pytest.importorskip("ray", reason="needs the extra moe-fast[ray]")

from moe_fast.distributed import corpus as module
from moe_fast.distributed import embed_corpus
from moe_fast.inference import EncoderSettings, embed_file, load_model, open_vectors
from tests.distributed.conftest import rows, write_corpus


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Row groups by job; ``calls.after = n``: the run is killed after so many."""

    class Calls(list):
        after = None

    seen = Calls()

    @contextlib.contextmanager
    def running(address, workers, threads, device):
        def run(job, groups):
            job = pickle.loads(pickle.dumps(job))
            for group in groups:
                if len(seen) == seen.after:
                    raise Killed
                seen.append((type(job).__name__, group.number))
                yield job(json.loads(json.dumps(group.__dict__)))

        yield run

    monkeypatch.setattr(module, "_running", running)
    return seen


def settings(models, **changes):
    return EncoderSettings(str(models / "moe"), device="cpu", **changes)


def embed(source, output, chosen, **options):
    options = {"domain_column": "domain", "threads": 1, "progress": False, **options}
    return embed_corpus(source, output, chosen, **options)


def read(path):
    pieces = list(open_vectors(path).pieces())
    return [key for ids, _ in pieces for key in ids], np.concatenate([v for _, v in pieces])


def expected(models, count=24):
    model = load_model(str(models / "moe"), device="cpu")
    return model.encode(rows(count)["text"], domain=rows(count)["domain"])


def test_each_row_group_becomes_a_file_in_order(models, corpus, tmp_path, calls):
    done = embed(corpus, tmp_path / "out", settings(models))
    assert (done.rows, done.dimension, done.resumed_rows) == (24, 32, 0)
    assert sorted(os.listdir(tmp_path / "out")) == [f"part-{i:08d}.parquet" for i in range(5)]
    assert not (tmp_path / "out.parts").exists()
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [len(table) for table in tables] == [6, 6, 2, 6, 4]
    assert tables[0].schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert len(pq.read_table(tmp_path / "out")) == 24, "readers of folders take it"
    ids, vectors = read(tmp_path / "out")
    assert ids == rows(24)["id"]
    np.testing.assert_allclose(vectors, expected(models), rtol=0, atol=1e-6)


def test_workers_use_the_backend_of_the_run(models, corpus, tmp_path, monkeypatch):
    from moe_fast.distributed.embedder import Embedder
    from moe_fast.ops import backends, use_backend

    seen, encode = set(), Embedder.embed
    monkeypatch.setattr(
        Embedder, "embed", lambda *args: (seen.add(backends.default), encode(*args))[1]
    )
    running = module._running

    @contextlib.contextmanager
    def elsewhere(*args):
        """Another process, which has the default backend."""
        with running(*args) as run, use_backend("auto"):
            yield run

    monkeypatch.setattr(module, "_running", elsewhere)
    with use_backend("torch"):
        embed(corpus, tmp_path / "out", settings(models))
    assert seen == {"torch"}


def test_ids_are_the_rows_of_the_corpus_if_it_has_none(models, tmp_path):
    source = write_corpus(tmp_path / "c", [14, 10], 6)
    for path in source.iterdir():
        table = pq.read_table(path).drop_columns(["id", "domain"])
        pq.write_table(table, path, row_group_size=6)
    embed(source, tmp_path / "out", settings(models, domain="law"), domain_column=None)
    ids, vectors = read(tmp_path / "out")
    assert ids == [str(i) for i in range(24)]
    one = tmp_path / "one.parquet"
    pq.write_table(pa.table({"text": rows(24)["text"]}), one)
    embed_file(one, tmp_path / "v.parquet", settings(models, domain="law"), progress=False)
    same, others = read(tmp_path / "v.parquet")
    assert ids == same
    np.testing.assert_allclose(vectors, others, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float16"])
def test_precisions_are_those_of_one_machine(precision, models, corpus, tmp_path, calls):
    embed(corpus, tmp_path / "out", settings(models), precision=precision)
    table = pq.read_table(tmp_path / "out")
    found = np.array(table["embedding"].to_pylist())
    about = json.loads(pq.read_schema(tmp_path / "out/part-00000002.parquet").metadata[b"moe_fast"])
    vectors = expected(models)
    assert (about["precision"], about["dimension"]) == (precision, 32)
    if precision == "float16":
        np.testing.assert_allclose(found, vectors, rtol=0, atol=1e-3)
    elif precision.endswith("int8"):
        np.testing.assert_allclose(
            about["ranges"], [vectors.min(0), vectors.max(0)], rtol=0, atol=1e-6
        )
        difference = found - quantize_embeddings(vectors, precision).astype(int)
        assert np.abs(difference).max() <= 1 and (difference == 0).mean() > 0.98
        assert [name for name, _ in calls] == ["EmbedJob"] * 5 + ["QuantizeJob"] * 5
    else:
        np.testing.assert_array_equal(found, quantize_embeddings(vectors, precision))


@pytest.mark.parametrize("after", [1, 4, 5, 7])
def test_a_run_that_was_killed_goes_on(after, models, corpus, tmp_path, calls):
    """Also between the two jobs, and within the second one."""
    calls.after = after
    with pytest.raises(Killed):
        embed(corpus, tmp_path / "out", settings(models), precision="int8")
    assert not (tmp_path / "out").exists()
    calls.after = None
    done = embed(corpus, tmp_path / "out", settings(models), precision="int8")
    assert done.resumed_rows == [0, 6, 12, 14, 20, 24][min(after, 5)]
    assert calls == [("EmbedJob", i) for i in range(5)] + [("QuantizeJob", i) for i in range(5)]
    embed(corpus, tmp_path / "whole", settings(models), precision="int8")
    assert pq.read_table(tmp_path / "out").equals(pq.read_table(tmp_path / "whole"))
    assert not (tmp_path / "out.parts").exists()


def test_a_damaged_file_is_computed_again(models, corpus, tmp_path, calls):
    calls.after = 7
    with pytest.raises(Killed):
        embed(corpus, tmp_path / "out", settings(models), precision="int8")
    part = tmp_path / "out.parts/vectors/part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    del calls[:]
    calls.after = None
    embed(corpus, tmp_path / "out", settings(models), precision="int8")
    assert calls == [("EmbedJob", 1)] + [("QuantizeJob", i) for i in range(5)]


def test_a_row_group_that_is_done_again_has_one_file(models, corpus, tmp_path, monkeypatch):
    """As Ray does where a worker died after it had written, and before it could say so."""
    running = module._running

    @contextlib.contextmanager
    def twice(*args):
        with running(*args) as run:
            yield lambda job, groups: run(job, [*groups, *groups[:3]])

    monkeypatch.setattr(module, "_running", twice)
    embed(corpus, tmp_path / "out", settings(models))
    assert read(tmp_path / "out")[0] == rows(24)["id"]


def test_a_row_group_that_kills_its_workers_ends_the_run(models, corpus, tmp_path, monkeypatch):
    from moe_fast.distributed.row_groups import EmbedJob

    call, died = EmbedJob.__call__, []

    def die(self, item):
        if item["number"] == 2 and len(died) < 5:
            died.append(self.folder.begin(module.RowGroup(**item)))
            return die(self, item)
        return call(self, item)

    monkeypatch.setattr(EmbedJob, "__call__", die)
    with pytest.raises(ValueError, match=r"0\.parquet, row group 3: 5 workers died at it"):
        embed(corpus, tmp_path / "out", settings(models))
    assert embed(corpus, tmp_path / "out", settings(models)).resumed_rows == 12
    assert not (tmp_path / "out.parts").exists()


def test_killed_before_the_clean_up(models, corpus, tmp_path, calls):
    def die():
        raise Killed

    with pytest.raises(Killed):
        embed(corpus, tmp_path / "out", settings(models), finish=die)
    with pytest.raises(FileExistsError, match="out exists already"):
        embed(corpus, tmp_path / "out", settings(models, normalize=True))
    del calls[:]
    assert embed(corpus, tmp_path / "out", settings(models)).resumed_rows == 24
    assert not calls and not (tmp_path / "out.parts").exists()
    with pytest.raises(FileExistsError, match="out exists already"):
        embed(corpus, tmp_path / "out", settings(models))
    done = embed(corpus, tmp_path / "out", settings(models), overwrite=True)
    assert done.resumed_rows == 0 and len(calls) == 5, "what is finished is computed again"


def test_another_run_is_refused_or_replaces(models, corpus, tmp_path, calls):
    calls.after = 2
    with pytest.raises(Killed):
        embed(corpus, tmp_path / "out", settings(models))
    calls.after = None
    for options, named in (({"chunk_size": 5}, r"chunk_size \(1024 then, 5 now\)"),):
        with pytest.raises(FileExistsError, match=rf"out\.parts holds the files.*{named}"):
            embed(corpus, tmp_path / "out", settings(models), **options)
    os.utime(corpus / "1.parquet", (1, 1))
    with pytest.raises(FileExistsError, match="differs from this one in source"):
        embed(corpus, tmp_path / "out", settings(models))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    done = embed(corpus, tmp_path / "out", settings(models), overwrite=True)
    assert done.resumed_rows == 0 and not (tmp_path / "out" / "old.txt").exists()
    assert read(tmp_path / "out")[0] == rows(24)["id"]
    assert sorted(os.listdir(tmp_path)) == ["corpus", "out"]


def test_what_is_not_ours_is_kept(models, corpus, tmp_path):
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match=r"out\.parts is where .* something else"):
        embed(corpus, tmp_path / "out", settings(models), overwrite=True)
    assert (tmp_path / "out.parts" / "thesis.txt").read_text() == "years"


def test_texts_that_cannot_be_embedded_are_named(models, corpus, tmp_path, calls):
    table = pq.read_table(corpus / "1.parquet").to_pydict()
    table["text"][7] = "w1 " * 50
    pq.write_table(pa.table(table), corpus / "1.parquet", row_group_size=6)
    with pytest.raises(ValueError, match=r"4 texts from .*1\.parquet, row 7: .*at most"):
        embed(corpus, tmp_path / "out", settings(models))
    table["text"][7] = ""
    pq.write_table(pa.table(table), corpus / "1.parquet", row_group_size=6)
    with pytest.raises(ValueError, match=r"1\.parquet, row 8: text is empty"):
        embed(corpus, tmp_path / "out", settings(models), overwrite=True)


def test_texts_that_are_cut_are_counted(models, corpus, tmp_path, caplog):
    table = pq.read_table(corpus / "1.parquet").to_pydict()
    table["text"][7] = "w1 " * 50
    pq.write_table(pa.table(table), corpus / "1.parquet", row_group_size=6)
    done = embed(corpus, tmp_path / "out", settings(models, truncate=True))
    assert done.truncated_rows == 1
    assert "1 of 24 texts are longer than max_seq_length = 32" in caplog.text


def test_what_is_refused_before_any_work(models, corpus, tmp_path, calls):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_text("not Parquet")
    both = settings(models, domain="law")
    for source, chosen, options, error, message in (
        (tmp_path / "none", None, {}, FileNotFoundError, "there is no file or folder .*none"),
        (tmp_path / "empty", None, {}, FileNotFoundError, r"empty has no file \*\.parquet"),
        (tmp_path / "x.jsonl", None, {}, ValueError, "reads .parquet files.*got '.jsonl'"),
        (tmp_path / "bad", None, {}, ValueError, r"x\.parquet: not readable as Parquet"),
        (
            corpus,
            None,
            {"columns": ("body",)},
            ValueError,
            "no column .*body.*; columns present: .*id",
        ),
        (corpus, None, {"workers": 0}, ValueError, "workers must be"),
        (corpus, None, {"threads": 10_000}, ValueError, "threads must be at most"),
        (corpus, None, {"precision": "int4"}, ValueError, "precision must be one of"),
        (corpus, both, {}, ValueError, "give domain or domain_column, not both"),
    ):
        with pytest.raises(error, match=message):
            embed(source, tmp_path / "out", chosen or settings(models), **options)
    assert not calls and not list(tmp_path.glob("out*"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError, match="out must be a folder; it is a file"):
        embed(corpus, tmp_path / "out", settings(models), overwrite=True)
    assert not calls
