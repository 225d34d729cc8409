"""Reads files of texts, pairs, triplets, judgements and papers into datasets, and writes them."""

from __future__ import annotations

from moe_fast.data.cocitation import CocitationPairs, CocitationReport, cocitation_pairs
from moe_fast.data.entrez import EntrezClient
from moe_fast.data.flag_rows import read_flag_rows
from moe_fast.data.mining import MinedRows, MiningReport, MiningSettings, mine_hard_negatives
from moe_fast.data.pairs import read_pairs
from moe_fast.data.pmc_papers import FetchedDomain, fetch_papers
from moe_fast.data.qrels import read_qrels
from moe_fast.data.retrieval import Retrieval, read_retrieval, read_retrieval_files
from moe_fast.data.splits import split_by
from moe_fast.data.sts import read_sts
from moe_fast.data.texts import TextRow, read_texts
from moe_fast.data.training_data import read_training_data
from moe_fast.data.triplets import read_triplets
from moe_fast.data.write import write_flag_rows, write_pairs, write_papers

__all__ = [
    "CocitationPairs",
    "CocitationReport",
    "EntrezClient",
    "FetchedDomain",
    "MinedRows",
    "MiningReport",
    "MiningSettings",
    "Retrieval",
    "TextRow",
    "cocitation_pairs",
    "fetch_papers",
    "mine_hard_negatives",
    "read_flag_rows",
    "read_pairs",
    "read_qrels",
    "read_retrieval",
    "read_retrieval_files",
    "read_sts",
    "read_texts",
    "read_training_data",
    "read_triplets",
    "split_by",
    "write_flag_rows",
    "write_pairs",
    "write_papers",
]
