"""What all commands share: their common options, what they print, and the status they end with.

A command is a function that returns an Answer; `configured` and `unconfigured` make of it what the
command line calls, with the common options around those of its own.
"""

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from index_builder.errors import KithError
from pipelines.commands.answers import Answer
from pipelines.commands.options import ConfigOption, JsonOption, SetOption, VerboseOption

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session


def _option(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


# Typer fills it in; it is no option.
_CONTEXT = _option("context", typer.Context)
_CONFIG = _option("config", ConfigOption)
_SET = _option("overrides", SetOption, None)
_PRINTING = (_option("as_json", JsonOption, False), _option("verbose", VerboseOption, False))


def configured(command: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a command of a function of a configuration, a session and then its own options.

    Adds --config before them, --set, --json and --verbose behind. What stood after `--` on the command
    line is the context's object, and goes to Beam.
    """

    @functools.wraps(command)
    def run(
        context: typer.Context,
        config: str,
        overrides: list[str] | None,
        as_json: bool,
        verbose: bool,
        **own: Any,
    ) -> None:
        def work(console: Console) -> Answer:
            return command(*_open_session(config, overrides, context.obj or (), console), **own)

        _report(context, as_json, verbose, work)

    return _with_options(run, [_CONTEXT, _CONFIG, *_own_options(command)[2:], _SET, *_PRINTING])


def unconfigured(command: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a command of a function of its own options alone; adds --json and --verbose."""

    @functools.wraps(command)
    def run(context: typer.Context, as_json: bool, verbose: bool, **own: Any) -> None:
        _report(context, as_json, verbose, lambda _: command(**own))

    return _with_options(run, [_CONTEXT, *_own_options(command), *_PRINTING])


def _own_options(command: Callable[..., Answer]) -> list[inspect.Parameter]:
    parameters = inspect.signature(command).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]


def _with_options(run: Callable[..., None], options: list[inspect.Parameter]) -> Callable[..., None]:
    """Gives a function the signature that the command line is read by."""
    described: Any = run
    described.__signature__ = inspect.Signature(options)
    described.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _report(
    context: typer.Context, as_json: bool, verbose: bool, work: Callable[[Console], Answer]
) -> None:
    """Does the work of a command: reports the answer, turns errors into a status."""
    name = context.command.name
    console = Console(stderr=True)
    _quiet_libraries(verbose)
    try:
        # Whatever a library prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            answer = work(console)
    except (Exception, KeyboardInterrupt) as error:  # The outermost boundary: all ends in a status.
        if verbose:
            traceback.print_exc()
        status = getattr(error, "exit_status", 1)
        message = _message(error)
        if isinstance(error, KeyboardInterrupt):
            status, message = 130, "Interrupted. Run the same command again to go on."
        if as_json:
            failure = {"kind": type(error).__name__, "message": message}
            failed = {"command": name, "status": "failed", "exit_status": status, "error": failure}
            print(json.dumps(failed))
        console.print(f"kith {name}: {message}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(status) from error
    if as_json:
        document = {"command": name, "status": "done", **answer.result}
        print(json.dumps(document, ensure_ascii=False))
    else:
        answer.show(answer.result, Console(soft_wrap=True))


def _message(error: BaseException) -> str:
    if isinstance(error, KithError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}. Check the path and its permissions; --verbose shows where this happened."
    return (
        f"Unexpected {type(error).__name__}: {error}. Nothing was published. This may be a defect of "
        "Kith; --verbose shows where it happened."
    )


def _open_session(
    config_path: str, overrides: list[str] | None, beam_options: tuple[str, ...], console: Console
) -> tuple["Config", "Session"]:
    # Beam warns on import about packages that Kith does not use.
    with _silence(logging.ERROR):
        from pipelines.config_loading import load_config
        from pipelines.runners import RunnerSpec
        from pipelines.stage import Session
    config = load_config(config_path, overrides or ())
    return config, Session(RunnerSpec(config.runner, beam_options), console)


@contextlib.contextmanager
def _silence(level: int) -> Iterator[None]:
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _quiet_libraries(verbose: bool) -> None:
    """Leaves standard error to Kith's own messages, unless --verbose asks for everything."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    if not verbose:
        warnings.filterwarnings("ignore")
        # A failing step is logged with its traceback; Kith reports the failure itself.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def held_workspace(config: "Config") -> Iterator[None]:
    """Holds the workspace for a command that writes to it, after a look whether that is possible."""
    from pipelines.preflight import check_workspace
    from pipelines.runners import workspace_lock

    check_workspace(config.workspace)
    with workspace_lock(config.workspace):
        yield
