"""The memory of training: the parts, and the table."""

import ctypes

import pytest
import torch

from bench.training_memory import COLUMNS, bytes_of, free_in_malloc, main
from tests.models.tiny import save_sentence_transformer

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)


def test_bytes_are_those_of_different_storages():
    whole = torch.zeros(10, 4)
    assert bytes_of([whole, whole[2:], torch.zeros(3), 1]) == 160 + 12


@needs_glibc
def test_what_malloc_keeps_is_counted():
    assert free_in_malloc() > 0


@needs_glibc
@pytest.mark.slow  # loads the libraries in two processes
def test_the_table(tmp_path, capsys):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    folder = save_sentence_transformer(tmp_path)
    words = ["--model", folder, "--steps", "2", "--batch", "4", "--tokens", "16"]
    assert main([*words, "--mallocs", "default"]) == 0
    *_, names, _, dense, mixture = capsys.readouterr().out.splitlines()
    assert names.startswith("| malloc | model | peak | ")
    for who, line in (("dense", dense), ("mixture", mixture)):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == ["default", who] and len(cells) == 2 + len(COLUMNS)
        peak, resident, free, trimmed = map(int, cells[2:6])
        assert peak >= resident >= trimmed > free
