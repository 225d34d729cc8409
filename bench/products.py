"""The products of bf16 experts by rows per expert: what kernels/csrc/cpu/product_table.h is from.

``python -m bench.products`` runs the forward of experts by each product that this processor has
(MOE_FAST_PRODUCT), in a process each, which take turns. It prints times for each width and number
of rows, and the most rows up to which dot products are the fastest.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import timeit
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch

EXPERTS = 8
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)  # per expert
SIZES = {384: 1536, 768: 3072, 1024: 4096}  # D: H, both multiples of 32, as tiles need
OTHER_SIZES = {380: 1540, 764: 3076}  # which tiles do not take
PRODUCTS = ("dots", "blocks", "tiles")


def serve(product: str, threads: int, pipe: Connection) -> None:
    """Answer (D, H, rows per expert) with the least seconds of some calls, until None comes."""
    os.environ["MOE_FAST_PRODUCT"] = product
    try:
        from moe_fast import ops
    except ValueError as error:  # this processor does not have it
        pipe.send(str(error))
        return
    from .problem import Problem, Shape

    torch.set_num_threads(threads)
    pipe.send(None)
    problem = None
    while (asked := pipe.recv()) is not None:
        dim, hidden, rows = asked
        if problem is None or problem.shape.dim != dim:
            most = max(ROWS) * EXPERTS
            problem = Problem(Shape(most, EXPERTS, 1, dim, hidden, torch.bfloat16))
        tokens = rows * EXPERTS
        few = {name: problem.tensors[name][:tokens] for name in ("x", "top_k_weights")}
        even = ops.plan(torch.arange(tokens).remainder(EXPERTS)[:, None], EXPERTS)
        run = partial(problem.forward, problem.tensors | few, even)
        with torch.inference_mode():
            run()
            pipe.send(min(timeit.repeat(run, number=1, repeat=7)))


def measure(sizes: dict[int, int], rounds: int, threads: int) -> dict[int, dict[str, list[float]]]:
    """Return the median seconds of each product for each width, in the order of ROWS."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for product in PRODUCTS:
        pipes[product], theirs = context.Pipe()
        context.Process(target=serve, args=(product, threads, theirs), daemon=True).start()
    for product, reason in [(product, pipe.recv()) for product, pipe in pipes.items()]:
        if reason is not None:
            print(f"{product}: {reason}")
            del pipes[product]
    found: dict[int, dict[str, list[float]]] = {}
    for dim, hidden in sizes.items():
        found[dim] = {product: [] for product in pipes}
        for rows in ROWS:
            times: dict[str, list[float]] = {product: [] for product in pipes}
            for _ in range(rounds):
                for product, pipe in pipes.items():
                    pipe.send((dim, hidden, rows))
                    times[product].append(pipe.recv())
            for product, seconds in times.items():
                found[dim][product].append(statistics.median(seconds))
    for pipe in pipes.values():
        pipe.send(None)
    return found


def most_rows_of_dots(found: dict[int, dict[str, list[float]]], other: str) -> int:
    """Return the most rows up to which dots are faster, in the geometric mean over the widths."""
    most = 0
    for i, rows in enumerate(ROWS):
        if math.prod(times["dots"][i] / times[other][i] for times in found.values()) > 1:
            break
        most = rows
    return most


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.products", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of all products in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    for sizes in (SIZES, OTHER_SIZES):
        found = measure(sizes, arguments.rounds, arguments.threads)
        print(f"\nmilliseconds of {EXPERTS} experts by rows per expert")
        for dim, products in found.items():
            print(f"{f'D = {dim}':10}" + "".join(f"{rows:8}" for rows in ROWS))
            for product, times in products.items():
                print(f"{product:10}" + "".join(f"{1e3 * t:8.2f}" for t in times))
        measured = next(iter(found.values()))
        other = "tiles" if sizes is SIZES and "tiles" in measured else "blocks"
        if "dots" in measured:
            print(f"most rows of dots beside {other}: {most_rows_of_dots(found, other)}")


if __name__ == "__main__":
    main()
