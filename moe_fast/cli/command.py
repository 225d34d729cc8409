"""Adds to every command the global options, the configuration file, errors and exit codes."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.config import read_config, write_config
from moe_fast.cli.options import option
from moe_fast.cli.outputs import check_inputs_survive, check_names
from moe_fast.environment import variables
from moe_fast.messages import printable

_PANEL = "Global options"
_NOT_SETTINGS = ("config", "quiet", "debug")
_NOT_SAVED = ("overwrite", "resume")  # consent for one run, which a later run must not inherit


@dataclass(frozen=True)
class Run:
    """One run of a command, with its settings and global options.

    Attributes:
        command: the command's name.
        settings: {parameter of the command: its value}.
        seed: of all random numbers.
        quiet: no progress bars, notes or warnings; results and errors are still printed.
        held: context managers that the command enters, such as a lock on its output; they are left
            when it ends.
    """

    command: str
    settings: Mapping[str, Any]
    seed: int
    quiet: bool
    held: ExitStack = field(default_factory=ExitStack)

    def say(self, text: str) -> None:
        """Print a note, unless quiet; of several processes only the first one prints it."""
        if not self.quiet and is_first_process():
            print(text, flush=True)

    def save_settings(self, result: str | Path, *, beside: bool = False) -> None:
        """Write the settings beside a result file, or into a result folder unless `beside`.

        Call it before the result file gets its name. If the run is killed between the two, there is
        no result, which would be an error when the same command is run again.
        """
        from moe_fast.version import __version__

        result = Path(result)
        folder = result.is_dir() and not beside
        path = result / f"{self.command}.yaml" if folder else Path(f"{result}.yaml")
        title = f"moe-fast {self.command}, version {__version__}; run it again with --config"
        settings = {name: v for name, v in self.settings.items() if name not in _NOT_SAVED}
        write_config(path, settings, title)


def is_first_process() -> bool:
    """Return whether this process writes the results, as the first of torchrun's processes does."""
    return os.environ.get("RANK", "0") == "0"


def add_command(app: typer.Typer, name: str, function: Callable, example: str) -> None:
    """Make a function a command of ``app``.

    The command has the function's parameters, except ``run``, which gets a :class:`Run`, and the
    global options. An error ends the process with exit code 1 and one line on stderr.

    Args:
        app: the application.
        name: the command's name.
        function: the function to call.
        example: a command line that works, shown at the end of the help.
    """
    own = [parameter for parameter in _parameters(function) if parameter.name != "run"]
    parameters = [*own, *_parameters(_global_options)]

    @functools.wraps(function)
    def run(ctx: typer.Context, **values: Any) -> None:
        _check_finite(values)
        check_names(name, values)
        settings = {k: v for k, v in values.items() if k not in _NOT_SETTINGS}
        arguments = {parameter.name: values[parameter.name] for parameter in own}
        state = Run(name, settings, values["seed"], values["quiet"])
        with _errors(name, values["debug"]), _environment(values["backend"], state), state.held:
            check_inputs_survive(settings)
            function(**arguments, run=state)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
    settable = [p for p in parameters if p.name not in _NOT_SETTINGS]
    app.command(
        name,
        epilog=f"Example:  {example}",
        no_args_is_help=any(p.default is inspect.Parameter.empty for p in own),
        context_settings={"obj": {p.name: _without_metadata(p.annotation) for p in settable}},
    )(run)


def _load_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Use a file's settings as the command's defaults; ``ctx.obj`` has the allowed parameters.

    Raises:
        typer.BadParameter: the file cannot be read, or has an unknown or invalid setting.
    """
    if path is not None and not ctx.resilient_parsing:
        try:
            ctx.default_map = read_config(path, ctx.obj)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    return path


def _global_options(
    *,
    config: Annotated[
        Path | None,
        option(
            _PANEL,
            "YAML file of settings with the names of the flags; flags override the file.",
            is_eager=True,
            callback=_load_config,
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "triton", "cpp", "tiled", "torch"],
        option(_PANEL, "Implementation of the operations; auto takes the fastest for each device."),
    ] = "auto",
    seed: Annotated[
        int,
        option(
            _PANEL,
            "Seed of all random numbers; the same seed gives the same result.",
            min=0,
            max=2**32 - 1,
        ),
    ] = 0,
    quiet: Annotated[
        bool,
        option(_PANEL, "No progress bars, notes or warnings; results and errors alone.", "--quiet"),
    ] = False,
    debug: Annotated[
        bool, option(_PANEL, "On failure, show Python's traceback.", "--debug")
    ] = False,
) -> None:
    """Define, by its parameters, the options that every command has."""


def _parameters(function: Callable) -> list[inspect.Parameter]:
    every = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]


def _check_finite(values: Mapping[str, Any]) -> None:
    """Raise typer.BadParameter for a setting that is NaN or infinite."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            flag = key.replace("_", "-")
            raise typer.BadParameter(f"--{flag} must be a finite number; got {value}")


def _without_metadata(annotation: Any) -> Any:
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


@contextmanager
def _errors(name: str, debug: bool) -> Iterator[None]:
    """Convert any error in the block to exit code 1 and one line on stderr; raise it if `debug`."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        _close_progress_bars()
        texts = [str(error), *getattr(error, "__notes__", ())]
        message = printable(" ".join(" ".join(texts).split())) or "no message"
        expected = (ValueError, TypeError, OSError, ImportError, RuntimeError)
        kind = "" if isinstance(error, expected) else f"{type(error).__name__}: "
        print(f"moe-fast {name}: error: {kind}{message}", file=sys.stderr)
        raise typer.Exit(1) from error


def _close_progress_bars() -> None:
    """End the line of a progress bar, so that the error message starts on a new line."""
    from tqdm import tqdm

    from moe_fast.compat import running_bars

    for bar in running_bars(tqdm):
        bar.leave = True
        bar.close()


@contextmanager
def _environment(backend: str, run: Run) -> Iterator[None]:
    """Set the backend, the seed and the libraries' messages within the block."""
    _load_package()
    from transformers import set_seed

    from moe_fast.ops import use_backend

    set_seed(run.seed)
    with _talk(), _silence() if run.quiet else nullcontext(), use_backend(backend):
        yield


def _load_package() -> None:
    """Run ``moe_fast/__init__.py`` if the program (moe_fast_cli.py) has postponed that."""
    package = sys.modules["moe_fast"]
    if not hasattr(package, "__version__"):
        package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]


@contextmanager
def _talk() -> Iterator[None]:
    """Turn off messages and bars of libraries that do not concern the user, within the block."""
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()  # those of loading and saving; training's stays
    try:
        with variables(HF_HUB_DISABLE_PROGRESS_BARS="1"):  # the same for worker processes
            yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


@contextmanager
def _silence() -> Iterator[None]:
    """Turn off warnings and progress bars within the block, also in worker processes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    later = {"PYTHONWARNINGS": "ignore", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        with warnings.catch_warnings(), variables(**later):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
