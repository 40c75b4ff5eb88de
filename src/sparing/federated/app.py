"""A recipe's fleet on real devices: the apps of a Flower SuperLink and its SuperNodes.

The server and each device build the same plan from a recipe file, so every one of them has the recipe and Sparing; a
device computes from its own share of the data only. Nothing but orders and weights travels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.core import files
from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.fingerprint import fingerprint
from sparing.core.pipeline import apply_steps, begin, plan
from sparing.core.recipe import PartRef, load_recipe
from sparing.core.store import Progress
from sparing.federated.flower import OverGrid, make_client_app, require_flower
from sparing.federated.metrics import ContinualMetrics
from sparing.federated.rounds import FleetPlan, one_thread, serve
from sparing.federated.step import Federate

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from sparing.core.job import Job

log = logging.getLogger("sparing")
_PROJECT = """\
[project]
name = "sparing-fleet"
version = "1.0.0"
description = "A fleet of Sparing"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "sparing"
fab-include = ["fleet.py"]

[tool.flwr.app.components]
serverapp = "fleet:server"
clientapp = "fleet:client"

[tool.flwr.app.config]
recipe = ""
seed = 0
data = ""
store = ""
out = ""
patience = 600
"""
_MODULE = '''\
"""A fleet of Sparing; its settings are in pyproject.toml."""

from sparing.federated.app import client_app, server_app

client = client_app()
server = server_app()
'''


@dataclass(frozen=True)
class RecipeFleet:
    """A recipe's first step ``federate`` and the job that it is given."""

    federate: Federate
    job: Job

    @cached_property
    def plan(self) -> FleetPlan:
        """Of the run."""
        return self.federate.fleet_of(self.job)

    @cached_property
    def mark(self) -> str:
        """Short fingerprint of the plan: it names the folder of a client's states."""
        return fingerprint(self.plan)[:16]

    def figures(self, accuracy: Sequence[Sequence[float]]) -> dict[str, Any]:
        """What a matrix of accuracies on the validation data says, for ``figures.json``."""
        if len(accuracy) == 1:
            return {f"validation {self.job.task.headline.name}": accuracy[0][0]}
        found = ContinualMetrics(accuracy)
        return {
            "validation accuracy": [list(row) for row in accuracy],
            "validation average accuracy": float(found.average_accuracy[-1]),
            "validation forgetting": float(found.forgetting[-1]),
            "validation backward transfer": found.backward_transfer,
        }


@cache
def fleet_of_recipe(recipe: str, seed: int = 0, data: str = "", store: str = "") -> RecipeFleet:
    """The fleet of a recipe's first step ``federate``, after the steps before it; made once in a process.

    Args:
        recipe: file, or name of a packaged recipe.
        seed: as of ``sparing run``.
        data: folder of the data sets; "": the usual one.
        store: folder for the results of the steps before; "": the usual one.

    Raises:
        RecipeError: the recipe cannot be read or planned, or has no such step.
        IncompatibleStep: clients cannot honour what the steps before ask for.
    """
    root = Path(data) if data else None
    read = plan(load_recipe(recipe), root).recipe
    place = next((index for index, step in enumerate(read.steps) if isinstance(step, Federate)), None)
    if place is None:
        raise RecipeError([f"{recipe}: a recipe with the step 'federate' is needed"])
    if after := [step.id for step in read.steps[place + 1 :]]:
        log.warning("%s: a fleet on devices ends with its weights; not run: %s", recipe, ", ".join(after))
    task: Any = {"name": read.task.name, **read.task.fields} if isinstance(read.task, PartRef) else read.task
    model: Any = {"name": read.model.name, **read.model.fields} if isinstance(read.model, PartRef) else read.model
    with one_thread():
        job = begin(task, model, trained=read.trained, seed=seed, data=root, store=store or None)
        job = apply_steps(job, read.steps[:place])
    federate: Any = read.steps[place]
    federate.check_job(job)
    return RecipeFleet(federate, job)


def _fleet(context: Context) -> RecipeFleet:
    told: dict[str, Any] = {"recipe": "", "seed": 0, "data": "", "store": "", **context.run_config}
    told |= {name: context.node_config[name] for name in ("data", "store") if name in context.node_config}
    if not told["recipe"]:
        raise InvalidValue("the run config names no recipe: flwr run … --run-config 'recipe=\"/path/to/recipe.yaml\"'")
    return fleet_of_recipe(told["recipe"], int(told["seed"]), told["data"], told["store"])


def _plan(context: Context) -> FleetPlan:
    return _fleet(context).plan


def _folder(context: Context) -> Path | None:
    folder = context.node_config.get("folder")
    return Path(str(folder)) / _fleet(context).mark if folder else None


def client_app() -> ClientApp:
    """The app of a SuperNode, whose node config has ``partition-id``, the client's number.

    It may have ``folder``, for the client's states, in a folder of their own for each fleet (without it they end with
    the run), ``data`` and ``store``.
    """
    require_flower("a fleet on devices")
    return make_client_app(_plan, _folder)


def server_app() -> ServerApp:
    """The app of the SuperLink: a run of the recipe's fleet.

    The run config has ``recipe``, and may have ``seed``, ``data``, ``store``, ``out`` (a folder for the state after
    each round, and in the end ``weights.safetensors``, ``figures.json`` and ``rounds.json``; a run that finds such a
    state goes on from it), and ``patience``, in seconds, for the devices to come. A folder with the state of another
    run is refused.
    """
    require_flower("a fleet on devices")
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        found = _fleet(context)
        fleet = found.plan
        told: dict[str, Any] = dict(context.run_config)
        if not told.get("out"):
            raise InvalidValue("the run config names no folder 'out' for the result")
        out = Path(told["out"])
        claim_folder(out, fleet)
        with OverGrid(grid, fleet, float(told.get("patience", 600))) as engine:
            measure = found.federate.task_figures(found.job)
            result = serve(fleet, engine, Progress(out / "progress"), measure)
        files.write_tensors(out / "weights.safetensors", result.weights)
        files.write_json(out / "figures.json", found.figures(result.figures))
        files.write_json(out / "rounds.json", [asdict(report) for report in (*result.rounds, result.end)])

    return app


def claim_folder(out: Path, fleet: FleetPlan) -> None:
    """Make a folder that of one plan, whose state only a run of the same plan may go on from.

    Raises :class:`InvalidValue` where it is another plan's.
    """
    note, own = out / "plan.json", {"fingerprint": fingerprint(fleet)}
    if not note.exists():
        files.write_json(note, own)
    elif files.read_json(note) != own:
        raise InvalidValue(
            f"{out} holds the state of a fleet with another recipe, seed, data or version of Sparing; name another "
            "folder, or remove this one"
        )


def write_app(folder: Path) -> None:
    """Write the folder that ``flwr run`` takes: the project file and the module with both apps."""
    files.write_atomic(folder / "pyproject.toml", _PROJECT.encode())
    files.write_atomic(folder / "fleet.py", _MODULE.encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sparing.federated.app FOLDER")
    write_app(Path(sys.argv[1]))
