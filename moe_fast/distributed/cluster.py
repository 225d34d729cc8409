"""Runs jobs on a Ray cluster: one that is there, or one on this machine that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_fast.environment import variables
from moe_fast.extras import require

logger = logging.getLogger(__name__)

_OBJECT_STORE = 100 << 20  # bytes; the workers read and write files, so that little passes through
_MOST_BLOCKS = 10_000  # Ray schedules blocks; below this, each item is one
_PATIENCE = 20  # seconds for Ray's processes to end
# Ray reports to its makers and listens on every address unless told otherwise, the latter by a
# variable that is named after the systems on which it listens on the loopback address by default.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "ERROR",
}
_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # one per process, for Ray reads it once
}


@contextlib.contextmanager
def ray_cluster(address: str | None, processors: int) -> Iterator[Any]:
    """Connect to a cluster within the block, and yield the module ``ray``.

    Args:
        address: that of the cluster, or "auto", as for ``ray.init``. ``None``: the cluster to which
            this program is connected already, or else a new one on this machine. It listens on the
            loopback address alone, asks for a random token, has no dashboard, sends no statistics,
            and all its processes and files are gone at the end of the block.
        processors: how many a new cluster offers to its workers.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        RuntimeError: Ray was imported before, so that a new cluster would listen on every address.
    """
    imported = sys.modules.get("ray")
    if imported is not None and imported.is_initialized():
        require("ray.data", "ray", "a run on a cluster")
        yield imported
        return
    with variables(**_QUIET, **({} if address else _LOOPBACK)):
        ray = require("ray", "ray", "a run on a cluster")
        require("ray.data", "ray", "a run on a cluster")
        if address is not None:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            try:
                yield ray
            finally:
                ray.shutdown()
        else:
            if ray.util.get_node_ip_address() not in ("127.0.0.1", "::1"):
                raise RuntimeError(
                    "Ray was imported before, and would listen on every address of this machine. "
                    "Call ray.init(), and its cluster is used; or give the address of one."
                )
            with _local_cluster(ray, processors):
                yield ray


@contextlib.contextmanager
def _local_cluster(ray: Any, processors: int) -> Iterator[None]:
    psutil = require("psutil", "ray", "a run on a cluster")
    before = set(psutil.Process().children())
    # A short path, for it is a part of the names of sockets, which have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(
            "local",
            num_cpus=processors,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            started = _descendants(psutil, before)
            ray.shutdown()
            _, alive = psutil.wait_procs(started, timeout=_PATIENCE)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _descendants(psutil: Any, but: set[Any]) -> list[Any]:
    """List the processes below this one, without those children and what is below them."""
    found = []
    for child in psutil.Process().children():
        if child not in but:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child, *child.children(recursive=True)]
    return found


class _Worker:
    """A worker's copy of a job, which is called with one item after the other."""

    def __init__(self, job: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = [values.tolist() for values in batch.values()]
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]
        results = [self._job(row) for row in rows]
        return {name: [result[name] for result in results] for name in results[0]}


def run_job(
    ray: Any,
    job: Callable[[dict[str, Any]], dict[str, Any]],
    items: Sequence[dict[str, Any]],
    *,
    workers: int,
    num_cpus: int,
    num_gpus: int,
) -> Iterator[dict[str, Any]]:
    """Call a job with every item, on workers of a cluster, and yield the results as they come.

    An item whose worker dies is given to another one, as often as it takes, so that the job may be
    called with an item again, also after it was done.

    Args:
        ray: see `ray_cluster`.
        job: a picklable callable; takes an item and returns such a dict.
        items: dicts of numbers and strings, all with the same keys.
        workers: the most workers.
        num_cpus, num_gpus: what each worker takes of the cluster.

    Raises:
        RuntimeError: the job raised an error, or the cluster is gone.
    """
    if not items:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = min(len(items), _MOST_BLOCKS)
    data = ray.data.from_items(list(items), override_num_blocks=blocks)
    results = data.map_batches(
        _Worker,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    try:
        yield from results.iter_rows()
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()
        raise RuntimeError(
            "the workers failed; what they had finished is kept: run again to go on. "
            f"{reason[-1] if reason else type(error).__name__}"
        ) from error
