"""Energy of one inference: read from the machine's counters where there are any, else estimated from its operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sparing.core.environment import version_of
from sparing.core.predictor import Description

MAC_PJ = {"fp32": 0.9 + 3.7, "fp16": 0.4 + 1.1, "bf16": 0.4 + 1.1, "int8": 0.1 + 0.2}
"""Picojoules of one multiply-accumulate: add + multiply of the format (int8: 8-bit multiply, 32-bit add)."""
ADD_PJ = {"fp32": 0.9, "fp16": 0.4, "bf16": 0.4, "int8": 0.1}
"""Picojoules of one addition alone, which is all that a spike asks of a synapse."""
DRAM_PJ_PER_BYTE = 1950 / 8
"""Mid-point of 1.3–2.6 nJ for a 64-bit word."""
MODEL = "Horowitz, ISSCC 2014, 45 nm"


def estimate_mj(description: Description) -> tuple[float | None, str]:
    """(millijoules of one inference at batch 1, the model or why there is none).

    Multiply-accumulates at the precision's price, and every byte an answer reads fetched from DRAM once: figures of M.
    Horowitz, "Computing's energy problem", ISSCC 2014, fig. 1.1.9, for a 45 nm process. A model of mixed formats pays
    the dearest one's price for all. It ranks models; it is not what this machine draws.
    """
    formats = [part.split()[0].lower() for part in description.precision.split("+") if part.strip()]
    if description.macs is None:
        return None, "no estimate: the multiply-accumulates of this model are not known"
    if not formats or not set(formats) <= set(MAC_PJ):
        return None, f"no estimate: {MODEL} has no price for {description.precision!r} operations"
    dearest = max(formats, key=MAC_PJ.__getitem__)
    read = description.model_bytes if description.fetched_bytes is None else description.fetched_bytes
    compute, fetch = description.macs * MAC_PJ[dearest], read * DRAM_PJ_PER_BYTE
    prices = f"{MAC_PJ[dearest]:.1f} pJ per {dearest} MAC"
    if description.accumulates is not None:
        compute += description.accumulates * ADD_PJ[dearest]
        prices += f", {ADD_PJ[dearest]:.1f} pJ per addition that a spike asks for"
    note = f"{MODEL}: {prices}, model bytes from DRAM once at 1.95 nJ per 8 bytes"
    return (compute + fetch) * 1e-9, note


def counter_missing() -> str:
    """Why no counter can even be tried, or empty."""
    return "" if version_of("zeus") else "no counter: zeus is not installed (pip install 'sparing[energy]')"


def open_counter() -> tuple[Callable[[], float], str]:
    """(joules drawn so far, the counter's name): the CPU packages' RAPL counters through zeus, DRAM where counted.

    Raises whatever zeus raises where there is no readable counter. To be called in a process of its own: zeus starts
    another that watches for counters that wrap around.
    """
    from zeus.device.cpu import get_cpus

    cpus: Any = get_cpus()

    def joules() -> float:
        found = [cpus.get_total_energy_consumption(index) for index in range(len(cpus))]
        return sum(one.cpu_mj + (one.dram_mj or 0.0) for one in found) / 1000

    joules()
    return joules, f"RAPL of {len(cpus)} CPU package(s) through zeus, idle power included"


def joules_per_call(call: Callable[[], Any], joules: Callable[[], float], seconds: float) -> tuple[float, int]:
    """(joules of one call, calls made) over at least ``seconds`` of back-to-back calls."""
    call()
    count, before, start = 0, joules(), time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        call()
        count += 1
    return (joules() - before) / count, count
