"""The command ``sparing``: its commands and options. What they do is imported when one of them is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from sparing import __version__
from sparing.cli.output import Finished, json_only, print_error

app = App(
    name="sparing",
    help="Deep learning that costs less, and a ledger that shows what was saved and what was lost.\n\n"
    "Start with: sparing run quickstart. SPARING_DEBUG=1, or --debug after a command, shows tracebacks.",
    version=__version__,
    help_format="plaintext",
    help_flags=["--help", "-h"],
    default_parameter=Parameter(negative=()),
)
data_app = App(
    name="data", help="List the published data sets Sparing reads, and check what is there.", help_format="plaintext"
)
app.command(data_app)

Json = Annotated[bool, Parameter(name="--json", show_default=False)]
Data = Annotated[Path | None, Parameter(name="--data", show_default=False)]
Trust = Annotated[tuple[str, ...], Parameter(name="--trust", show_default=False)]


@app.command
def run(
    recipe: str,
    /,
    *,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", show_default=False)] = (),
    seeds: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 1,
    data: Data = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], show_default=False)] = None,
    until: Annotated[str | None, Parameter(show_default=False)] = None,
    dry_run: Annotated[bool, Parameter(show_default=False)] = False,
    store: Annotated[Path | None, Parameter(show_default=False)] = None,
    trust: Trust = (),
    json: Json = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], show_default=False)] = False,
) -> Any:
    """Run a recipe: every step, a measured ledger row after each, and a saved model.

    What an earlier run finished is not done again; a run that was stopped goes on when it is started again.

    Parameters
    ----------
    recipe
        A recipe file, or the name of a packaged recipe (see: sparing list recipes).
    overrides
        Change the recipe, e.g. steps.baseline.epochs=5 or task=fashion_mnist. May be given several times.
    seeds
        How many seeds, counted from the recipe's own.
    data
        Folder of data sets. Default: $SPARING_DATA, or the user's data folder.
    out
        Where ledger, report and model go. Default: runs/NAME of the recipe.
    until
        Stop after the step with this id.
    dry_run
        Check the whole recipe and print the plan; nothing is trained or written.
    store
        Folder of finished work. Default: $SPARING_STORE, or the user's cache folder.
    trust
        A package whose model classes a saved model named in the recipe may use. May be given several times.
    json
        Print one JSON document and nothing else.
    quiet
        Print nothing but errors and the folder of the results.
    """
    from sparing.cli.running import run_recipe

    return run_recipe(
        recipe,
        overrides=overrides,
        seeds=seeds,
        data=data,
        out=out,
        until=until,
        dry_run=dry_run,
        store=store,
        trust=trust,
        json=json,
        quiet=quiet,
    )


@app.command(name="list")
def list_(
    kind: Literal["tasks", "steps", "models", "recipes"] | None = None, pattern: str = "*", /, *, json: Json = False
) -> Any:
    """List what there is, each with one line of what it is.

    Parameters
    ----------
    kind
        What to list; everything by default.
    pattern
        Only names that match, with * and ? as wildcards.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.catalogue import list_parts

    return list_parts(kind, pattern, json=json)


@app.command
def show(name: str, /, *, json: Json = False) -> Any:
    """Show a recipe's text, or a part's fields with their types, ranges and defaults.

    Parameters
    ----------
    name
        A task, step, model or recipe; steps/NAME and the like where a name stands for several.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.catalogue import show_part

    return show_part(name, json=json)


@app.command
def explain(run: Path, id: str, /, *, json: Json = False) -> Any:
    """Say why a step of a run was refused, kept or declined, with the candidates it looked at.

    Parameters
    ----------
    run
        A run's folder, or its ledger.json.
    id
        The step's id.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.runs import explain_step

    return explain_step(run, id, json=json)


@app.command
def compare(
    *runs: Path,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], show_default=False)] = None,
    json: Json = False,
) -> Any:
    """Put the last rows of several runs side by side, and write a page that compares them.

    Parameters
    ----------
    runs
        Two or more folders of runs; the first is what the others are compared with.
    out
        The HTML page. Default: none is written.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.runs import compare_runs

    return compare_runs(runs, out, json=json)


@app.command
def report(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], show_default=False)] = None,
    json: Json = False,
) -> Any:
    """Print a run's ledger and write its report as one self-contained HTML file.

    Parameters
    ----------
    run
        A run's folder, or its ledger.json.
    out
        The HTML file. Default: report.html beside the ledger.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.runs import report_run

    return report_run(run, out, json=json)


@app.command
def bench(
    folder: Path,
    /,
    *,
    threads: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    batch: Annotated[int, Parameter(validator=Number(gte=1))] = 64,
    max_latency_ms: Annotated[float | None, Parameter(validator=Number(gt=0), show_default=False)] = None,
    length: Annotated[int | None, Parameter(validator=Number(gte=1), show_default=False)] = None,
    data: Data = None,
    trust: Trust = (),
    json: Json = False,
) -> Any:
    """Measure one saved model: bytes, parameters, MACs, latency, throughput, memory, energy.

    Quality too, when the model's task is one of Sparing's and its data are there. With --max-latency-ms instead how a
    compiled model is served best: batch size and number of instances with the most throughput within that limit.

    Parameters
    ----------
    folder
        A saved model's folder.
    threads
        Threads of the runtime.
    batch
        Batch size of the throughput.
    max_latency_ms
        Find the batch size, instances and cores with the most throughput whose 99th percentile stays within this limit.
    length
        Tokens of each text, with --max-latency-ms. Default: the longest that the model was compiled for.
    data
        Folder of data sets. Default: $SPARING_DATA, or the user's data folder.
    trust
        A package whose model classes may be imported from the folder. May be given several times.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.benching import bench_folder, serve_folder
    from sparing.core.errors import InvalidValue

    if max_latency_ms is not None:
        if (threads, batch, data, tuple(trust)) != (1, 64, None, ()):
            raise InvalidValue("--max-latency-ms finds batch and threads itself: leave out all but --length and --json")
        return serve_folder(folder, max_latency_ms, length, json=json)
    if length is not None:
        raise InvalidValue(f"--length {length} is for --max-latency-ms, which is not given")
    return bench_folder(folder, threads=threads, batch=batch, data=data, trust=trust, json=json)


@app.command
def init(
    source: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], show_default=False)] = None,
    force: Annotated[bool, Parameter(show_default=False)] = False,
    json: Json = False,
) -> Any:
    """Look at your own images or your own model and write a commented file to start from.

    Parameters
    ----------
    source
        A folder with one sub-folder of images for each class (a recipe is written), or a model class as
        package.module:Class (a Python script is written).
    out
        The file to write. Default: named after the source, in the current folder.
    force
        Replace the file if it is there.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.starter import write_start

    return write_start(source, out, force=force, json=json)


@data_app.command(name="list")
def data_list(*, data: Data = None, json: Json = False) -> Any:
    """List the published data sets Sparing reads, where each is expected, and whether it is there.

    Parameters
    ----------
    data
        Folder of data sets. Default: $SPARING_DATA, or the user's data folder.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.datasets import list_data

    return list_data(data, json=json)


@data_app.command(name="check")
def data_check(*names: str, data: Data = None, json: Json = False) -> Any:
    """Read data sets, or folders of your own images, completely and say what is wrong with them.

    Exit code 1 when something is.

    Parameters
    ----------
    names
        Data sets, or folders of class sub-folders. Default: the data sets that are there.
    data
        Folder of data sets. Default: $SPARING_DATA, or the user's data folder.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.datasets import check_data

    return check_data(names, data, json=json)


@app.command
def cache(
    *,
    prune: Annotated[float | None, Parameter(name="--prune", validator=Number(gte=0), show_default=False)] = None,
    clear: Annotated[bool, Parameter(show_default=False)] = False,
    store: Annotated[Path | None, Parameter(show_default=False)] = None,
    json: Json = False,
) -> Any:
    """Show, prune or clear the store of finished work.

    Parameters
    ----------
    prune
        Delete results made more than so many days ago.
    clear
        Delete everything.
    store
        Folder of finished work. Default: $SPARING_STORE, or the user's cache folder.
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.housekeeping import tend_cache

    return tend_cache(prune, clear, store, json=json)


@app.command
def doctor(*, json: Json = False) -> Any:
    """Check this machine: versions, CPU features, threads, extras, known-bad combinations, the store.

    Exit code 1 when something is wrong.

    Parameters
    ----------
    json
        Print one JSON document and nothing else.
    """
    from sparing.cli.housekeeping import examine

    return examine(json=json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 (failed), 2 (usage), 130 (interrupted)."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("SPARING_DEBUG", "0") not in {"", "0"} or "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        if debug:
            raise
        wanted, place = ["sparing"], app
        for token in tokens:
            if token not in set(place) or token.startswith("-"):
                break
            wanted, place = [*wanted, token], place[token]
        with json_only("--json" in tokens) as emit:
            print_error(str(error), hint=" ".join([*wanted, "--help"]), emit=emit)
        return 2
    with json_only(bool(bound.arguments.get("json"))) as emit:
        try:
            answer = command(*bound.args, **bound.kwargs)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        except KeyboardInterrupt:
            print_error("interrupted; the same command goes on from what is finished", emit=emit)
            return 130
        except Exception as error:
            if debug:
                raise
            return _failed(error, emit)
        finished = answer if isinstance(answer, Finished) else Finished(answer)
        if emit is not None:
            emit(finished.document)
        return finished.code


def _failed(error: Exception, emit: Any) -> int:
    from sparing.core.errors import InvalidValue, RecipeError, SparingError

    notes = [note.splitlines()[0] for note in getattr(error, "__notes__", ())]
    if not isinstance(error, SparingError):
        where = "an error inside Sparing or a library it uses; SPARING_DEBUG=1 shows where"
        print_error(f"{type(error).__name__}: {error}", notes=[*notes, where], emit=emit, error=error)
        return 1
    print_error(str(error), notes=notes, emit=emit, error=error)
    return 2 if isinstance(error, InvalidValue | RecipeError) else 1


if __name__ == "__main__":
    sys.exit(main())
