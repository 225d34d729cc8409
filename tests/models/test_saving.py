"""save_pretrained: the old model or the new one, whole, whatever happens in between."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModel

import moe_fast
from tests.models.tiny import same_weights, save_sentence_transformer

# What Python tells an audit hook of before it touches the file system.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def mixture(bert, seed):
    moe = moe_fast.upcycle(bert, num_experts=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return moe


def save_in_child(save, dies_at):
    """Run ``save`` in a forked process, killed at its event number ``dies_at``.

    Returns:
        The number of events, where it lived to the end; ``None`` where it was killed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def die_in_time(event, args):
                nonlocal count
                if event in EVENTS:
                    count += 1
                    if count == dies_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die_in_time)
            save()
            os.write(write, str(count).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    return int(told)


def test_a_kill_at_any_point_leaves_one_model_whole(bert, tmp_path):
    old, new = mixture(bert, 0), mixture(bert, 1)
    place = tmp_path / "model"
    old.save_pretrained(place, max_shard_size="40KB")
    (place / "trainer_state.json").write_text("{}")
    events = save_in_child(lambda: new.save_pretrained(place), None)
    assert events > 10
    seen = set()
    for dies_at in range(1, events + 1):
        old.save_pretrained(place, max_shard_size="40KB")
        assert sorted(os.listdir(tmp_path)) == ["model"], "what the last kill left is gone"
        assert save_in_child(lambda: new.save_pretrained(place), dies_at) is None
        found = AutoModel.from_pretrained(place)
        seen.add(same_weights(found, new))
        assert same_weights(found, new) or same_weights(found, old)
        assert (place / "trainer_state.json").exists()
    assert seen == {False, True}, "kills before and after the exchange were both seen"


def test_a_killed_sentence_transformer(tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    dense = save_sentence_transformer(tmp_path)
    old, new = (moe_fast.upcycle(dense, num_experts=e) for e in (2, 3))
    place = str(tmp_path / "moe")
    old.save_pretrained(place)
    events = save_in_child(lambda: new.save_pretrained(place), None)
    experts = set()
    for dies_at in range(1, events + 1, 5):
        old.save_pretrained(place)
        assert save_in_child(lambda: new.save_pretrained(place), dies_at) is None
        found = moe_fast.MoESentenceTransformer(place, device="cpu")
        want = old if found.transformers_model.config.num_experts == 2 else new
        assert same_weights(found, want)
        experts.add(found.transformers_model.config.num_experts)
    assert experts == {2, 3}
    new.save_pretrained(place)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_full_disk(bert, tmp_path, monkeypatch):
    old, new = mixture(bert, 0), mixture(bert, 1)
    place = tmp_path / "model"
    old.save_pretrained(place)
    names = sorted(os.listdir(place))
    written = []

    def fill_up(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half a file")
        written.append(filename)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", fill_up)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(place)
    assert written
    assert sorted(os.listdir(place)) == names and os.listdir(tmp_path) == ["model"]
    assert same_weights(AutoModel.from_pretrained(place), old)


@pytest.mark.parametrize("sizes", [("50GB", "40KB"), ("40KB", "50GB"), ("40KB", "80KB")])
def test_no_weights_of_an_earlier_save_are_left(bert, tmp_path, sizes):
    old, new = mixture(bert, 0), mixture(bert, 1)
    (tmp_path / "fresh").mkdir()
    new.save_pretrained(tmp_path / "fresh", max_shard_size=sizes[1])
    old.save_pretrained(tmp_path / "model", max_shard_size=sizes[0])
    new.save_pretrained(tmp_path / "model", max_shard_size=sizes[1])
    assert sorted(os.listdir(tmp_path / "model")) == sorted(os.listdir(tmp_path / "fresh"))
    assert same_weights(AutoModel.from_pretrained(tmp_path / "model"), new)


def test_what_others_wrote_is_kept(bert, tmp_path):
    old, new = mixture(bert, 0), mixture(bert, 1)
    old.save_pretrained(tmp_path)
    assert "written by moe_fast" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    (tmp_path / "checkpoint-5").mkdir()
    old.save_pretrained(tmp_path / "checkpoint-5")
    new.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert same_weights(AutoModel.from_pretrained(tmp_path / "checkpoint-5"), old)
    assert same_weights(AutoModel.from_pretrained(tmp_path), new)


def test_variants_stand_beside_each_other(bert, tmp_path):
    full, half = mixture(bert, 0), mixture(bert, 1)
    full.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="half", max_shard_size="40KB")
    half.save_pretrained(tmp_path, variant="half")
    assert same_weights(AutoModel.from_pretrained(tmp_path), full)
    assert same_weights(AutoModel.from_pretrained(tmp_path, variant="half"), half)
    assert not list(tmp_path.glob("*-of-*")) and not list(tmp_path.glob("*.index*"))


def test_a_given_state_dict_is_what_is_saved(bert, tmp_path):
    old, new = mixture(bert, 0), mixture(bert, 1)
    old.save_pretrained(tmp_path, state_dict=dict(new.state_dict()))
    assert same_weights(AutoModel.from_pretrained(tmp_path), new)


def test_other_processes_write_nothing(bert, tmp_path):
    old, new = mixture(bert, 0), mixture(bert, 1)
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, is_main_process=False)
    assert same_weights(AutoModel.from_pretrained(tmp_path), old)


def test_a_file_in_its_place(bert, tmp_path):
    (tmp_path / "model").write_text("text")
    with pytest.raises(NotADirectoryError, match="model must be a folder"):
        mixture(bert, 0).save_pretrained(tmp_path / "model")


def test_pushing_uploads_the_files_under_the_folders_name(bert, tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            pushed["repo"] = repo_id
            return type("Url", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, timestamps, **kwargs):
        pushed["files"] = set(os.listdir(folder))

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Hub)
    monkeypatch.setattr(moe_fast.models.MoEBertModel, "_upload_modified_files", upload)
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})
    monkeypatch.setattr(
        transformers.modeling_utils, "create_and_tag_model_card", lambda *a, **k: card()
    )
    mixture(bert, 0).save_pretrained(tmp_path / "my-model", push_to_hub=True)
    assert pushed["repo"] == "my-model"
    assert {"config.json", "model.safetensors", "README.md"} <= pushed["files"]
    assert (tmp_path / "my-model" / "model.safetensors").exists()
