"""The checks that judge every step, task and model: ours in ``tests/common``, and yours in tests of one line each.

.. code-block:: python

    from sparing.testing import StepCase, check_step

    def test_my_step(tmp_path):
        check_step(StepCase(MyStep(rounds=2), before=(Train(epochs=1),), nothing="it always adds a term"), tmp_path)

A check that finds something raises :class:`AssertionError` and says what. No test framework is needed. Some checks fork
and kill what they forked.
"""

from sparing.testing.cases import QUICK, StepCase, offline, registered, tiny_task
from sparing.testing.graphs import TinyGraph, TinyGraphs, TinyPeople, graph_of
from sparing.testing.kills import survives_kills
from sparing.testing.models import MODEL_CHECKS, ModelCase, check_model
from sparing.testing.steps import STEP_CHECKS, check_step
from sparing.testing.tasks import TASK_CHECKS, TaskCase, check_task

__all__ = [
    "MODEL_CHECKS",
    "QUICK",
    "STEP_CHECKS",
    "TASK_CHECKS",
    "ModelCase",
    "StepCase",
    "TaskCase",
    "TinyGraph",
    "TinyGraphs",
    "TinyPeople",
    "check_model",
    "check_step",
    "check_task",
    "graph_of",
    "offline",
    "registered",
    "survives_kills",
    "tiny_task",
]
