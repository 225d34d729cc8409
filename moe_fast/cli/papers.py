"""``moe-fast papers``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import Overwrite, named_paths, option

EXAMPLE = (
    'moe-fast papers --query cancer="Breast Neoplasms" --query heart="Heart Failure" --from 2020 '
    "--to 2021-06 --email you@example.org -o pmc.jsonl"
)
_WHO = "Who asks"
EMAIL, API_KEY = "NCBI_EMAIL", "NCBI_API_KEY"  # environment variables


def run_command(
    *,
    query: Annotated[
        list[str],
        typer.Option(
            metavar="DOMAIN=TERM", help="MeSH term of a domain's papers; once for each domain."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File to write, .jsonl, .jsonl.gz or .parquet, for cocite."
        ),
    ],
    from_date: Annotated[
        str | None,
        typer.Option(
            "--from", help="First date of publication: YYYY, YYYY-MM or YYYY-MM-DD.", metavar="DATE"
        ),
    ] = None,
    to_date: Annotated[
        str | None, typer.Option("--to", help="Last date of publication.", metavar="DATE")
    ] = None,
    max_papers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Largest number of papers per domain, the first that the service names."
        ),
    ] = None,
    email: Annotated[
        str | None,
        option(_WHO, f"Your address, which NCBI asks for; by default that in {EMAIL}."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        option(
            _WHO,
            "File with your API key of NCBI, for 10 requests per second instead of 3; by default "
            f"the key in {API_KEY}. No file of settings holds the key.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Fetch papers of PubMed Central and their citations, for cocite.

    After a kill or an error of the service, the same command goes on where it ended.
    """
    from moe_fast.data import EntrezClient, fetch_papers

    email = email or os.environ.get(EMAIL)
    if not email or "@" not in email:
        raise typer.BadParameter(f"give your address by --email or {EMAIL}; got {email!r}")
    report = fetch_papers(
        named_paths(query, "--query", "DOMAIN=TERM"),
        output,
        EntrezClient(email, _api_key(api_key_file)),
        from_date=from_date,
        to_date=to_date,
        max_papers=max_papers,
        overwrite=overwrite,
        progress=not run.quiet,
        finish=lambda: run.save_settings(output),
    )
    for domain, count in report.items():
        out = {
            "not asked for": count.not_asked,
            "in an earlier domain": count.in_other,
            "without abstract": count.no_abstract,
            "without record": count.missing,
        }
        without = "".join(f", {n:,} {reason}" for reason, n in out.items() if n)
        run.say(f"{domain}: {count.papers:,} of {count.found:,} papers{without}")
    run.say(f"{output}: {sum(count.papers for count in report.values()):,} papers")


def _api_key(path: Path | None) -> str | None:
    """Return the API key in a file or in the environment, if there is one."""
    key = os.environ.get(API_KEY, "") if path is None else path.read_text(encoding="utf-8")
    if path is not None and not key.strip():
        raise ValueError(f"--api-key-file {path} is empty")
    return key.strip() or None
