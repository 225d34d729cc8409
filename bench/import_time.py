"""What ``import moe_fast`` costs over importing what it builds on.

Fresh processes in turn: one imports moe_fast, the other torch, transformers' ``AutoModel`` and the
four ``modeling_*`` modules that moe_fast subclasses. Each reports its own import seconds, the
interpreter's start left out: elapsed, which the target of at most 1.10 refers to, and processor
time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .harness import ROOT, alternate, environment, summarize, table, write_json

BASELINE = "torch + transformers"
TARGET = 1.10
IMPORTS = {
    BASELINE: """
import torch
from transformers import AutoModel
import transformers.models.bert.modeling_bert
import transformers.models.roberta.modeling_roberta
import transformers.models.xlm_roberta.modeling_xlm_roberta
import transformers.models.modernbert.modeling_modernbert
import transformers.models.camembert.modeling_camembert
import transformers.models.electra.modeling_electra
import transformers.models.distilbert.modeling_distilbert
import transformers.models.mpnet.modeling_mpnet
import transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl
import transformers.models.deberta.modeling_deberta
import transformers.models.deberta_v2.modeling_deberta_v2
import transformers.models.esm.modeling_esm
import transformers.models.nomic_bert.modeling_nomic_bert
import transformers.models.jina_embeddings_v3.modeling_jina_embeddings_v3
import transformers.models.eurobert.modeling_eurobert
""",
    "moe_fast": "import moe_fast",
}
# A lean import loads none of these, unless torch or transformers did.
FORBIDDEN = (
    "sentence_transformers",
    "datasets",
    "accelerate",
    "triton",
    "sklearn",
    "matplotlib",
    "typer",
    "click",
)

_CHILD = """
import json, sys, time
elapsed, cpu = time.perf_counter(), time.process_time()
{imports}
elapsed, cpu = time.perf_counter() - elapsed, time.process_time() - cpu
modules = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps({{"elapsed": elapsed, "cpu": cpu, "modules": modules}}))
"""


@dataclass(frozen=True)
class Import:
    """What one process reports: elapsed and processor seconds, and its top-level modules."""

    elapsed: float
    cpu: float
    modules: list[str]


def run_child(imports: str) -> Import:
    """Import in a fresh process, started in the repository root."""
    command = [sys.executable, "-c", _CHILD.format(imports=imports)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the importing process failed:\n{done.stderr}")
    return Import(**json.loads(done.stdout.splitlines()[-1]))


def check_lean() -> None:
    """Raise if ``import moe_fast`` loads an extra, Triton or a CLI library of its own accord."""
    before = set(run_child(IMPORTS[BASELINE]).modules)
    after = set(run_child(IMPORTS["moe_fast"]).modules)
    extra = sorted(after.intersection(FORBIDDEN) - before)
    if extra:
        raise AssertionError(f"import moe_fast must load none of {FORBIDDEN}; loads {extra}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if the ratio of elapsed times is above ``--fail-above``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="write the record to this file")
    parser.add_argument("--fail-above", type=float, help="exit with 1 above this ratio")
    arguments = parser.parse_args(argv)

    check_lean()  # also warms the file cache and writes the bytecode
    samplers = {name: lambda code=code: run_child(code) for name, code in IMPORTS.items()}
    reports = alternate(samplers, rounds=arguments.rounds, warmup=1)
    elapsed = summarize({k: [r.elapsed for r in v] for k, v in reports.items()}, BASELINE)
    cpu = summarize({k: [r.cpu for r in v] for k, v in reports.items()}, BASELINE)
    ratio = elapsed[-1].ratio.median
    print(table(elapsed, "import, elapsed"))
    print(table(cpu, "import, processor time"))
    print(
        f"target: at most {TARGET:.2f}; {'met' if ratio <= TARGET else 'missed'} with {ratio:.3f}"
    )
    if arguments.json:
        record = {"environment": environment(), "elapsed": elapsed, "cpu": cpu}
        write_json(arguments.json, record)
    return int(arguments.fail_above is not None and ratio > arguments.fail_above)


if __name__ == "__main__":
    sys.exit(main())
