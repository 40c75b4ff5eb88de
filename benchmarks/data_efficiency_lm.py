"""Does data efficiency train language models better on one budget of tokens?

python benchmarks/data_efficiency_lm.py [curriculum] [curriculum_ltd] [ltd_no_worse] [short_control]
    [pilot_budget] [us_addresses] [longer_budget]

Plain PyTorch loops with the library's sampler, pacing, post-processing, token dropping and token clock. They are kept
in the system's folder for temporary files as they end, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _claims import Claim, main
from _kept import Kept
from sparing.core.randomness import isolated_rng
from sparing.core.statistics import difference_over_seeds
from sparing.data import sequences, tokenizing
from sparing.data.sequences import Sequences, pad_sequences, read_documents
from sparing.data.text import first_of, read_text
from sparing.data.tokenizing import BytePairs, train_byte_pairs
from sparing.data_efficiency import (
    analysis,
    index,
    metrics,
    pacing,
    postprocessing,
    sampler,
    token_dropping,
    tokens,
)
from sparing.data_efficiency.analysis import DataAnalyzer
from sparing.data_efficiency.index import DifficultyIndex
from sparing.data_efficiency.metrics import Composed, SequenceLength, TokenFields, VocabularyRarity
from sparing.data_efficiency.pacing import linear, root
from sparing.data_efficiency.postprocessing import trim_batch, truncate_batch
from sparing.data_efficiency.sampler import CurriculumMetric, CurriculumSampler
from sparing.data_efficiency.token_dropping import drop_tokens
from sparing.data_efficiency.tokens import TokenCounter, TokenLR
from sparing.models import gpt
from sparing.models.gpt import Gpt

ISSUE = "issue Less training, section 1, gates"
SHEET = "sheet data_efficiency, demonstration"

LENGTH, BATCH, DEPTH, DIM, HEADS = 128, 8, 6, 64, 4
PEAK, WARMUP, DECAY, CLIP = 2e-3, 0.05, 0.1, 1.0
DROPPING = (1, 2, 3, 4)
SEEDS = (0, 1, 2)
BUDGET = 1_000_000
"""Effective tokens at which the gates are judged, within the sheet's 1–2 M; fixed before any of these trainings."""
PILOT, LONGER = 500_000, 2_000_000
SETTINGS = {
    "model": f"gpt, {DEPTH} blocks of width {DIM}, {HEADS} heads, untied, no dropout",
    "batch": f"{BATCH} windows of up to {LENGTH} characters",
    "optimizer": f"AdamW (0.9, 0.95), decay {DECAY}, gradient clipped at {CLIP}",
    "rate": f"{PEAK}, {WARMUP:.0%} of the tokens warm up, cosine to 0 over the tokens",
    "examined on": "a pilot of the sheet's author: another implementation, 0.5 M tokens, seeds 0 and 1, the same text",
    "loss": "last 10 % of the text, windows of 128 characters one after another, all tokens, nats per character",
}


# ------------------------------------------------------------------------------------------------------------ trainings


class Arm(NamedTuple):
    """How windows are cut and tokens dropped, in shares of the baseline's number of steps."""

    shortest: int = LENGTH
    """Characters of a window at first; they grow to ``longest`` over ``curriculum``."""
    longest: int = LENGTH
    curriculum: float = 0.6
    kept: int = LENGTH
    """Tokens that dropping layers compute at first; they grow to all over 90 %."""
    routing: float = 0.9


ARMS = {
    "baseline": Arm(),
    "CL": Arm(shortest=32),
    "CL+LTD": Arm(shortest=32, kept=64),
    "short": Arm(shortest=80, longest=80),
    "LTD": Arm(kept=64),
}


def decoder(vocabulary: int, seed: int) -> Gpt:
    """The same weights for all arms of a seed."""
    with isolated_rng("data efficiency", seed):
        return Gpt(vocabulary, LENGTH, DIM, DEPTH, HEADS)


class Run:
    """One training's model, optimizer, clock and counts; ``step`` learns from a batch.

    Args:
        vocabulary: number of tokens.
        seed: of the weights and the draws of token dropping.
        budget: effective tokens.
        kept: the schedule of token dropping, or None.
    """

    def __init__(self, vocabulary: int, seed: int, budget: int, kept: pacing.PacingFunction | None = None) -> None:
        self.model = decoder(vocabulary, seed).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=DECAY)
        self.rate = TokenLR(self.optimizer, PEAK, decay_tokens=budget, warmup_tokens=WARMUP * budget)
        self.counter = TokenCounter(DEPTH, 0 if kept is None else len(DROPPING), budget)
        self.dropping = None if kept is None else drop_tokens(self.model, kept, DROPPING, kind="decoder", seed=seed)
        self.linear, self.quadratic = 0.0, 0.0
        self.start = time.process_time()

    def step(self, ids: Tensor, mask: Tensor | None = None) -> bool:
        """Learn from token numbers (B, T + 1) where the mask is not 0; whether the budget is used up."""
        rows, length = len(ids), ids.shape[1] - 1
        kept = length if self.dropping is None else min(self.dropping.reserved_length, length)
        logits = self.model(ids[:, :-1], None if mask is None else mask[:, :-1]).flatten(0, 1)
        targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = cross_entropy(logits, targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        # tokens with a target; without padding these are rows · length
        self.count(int((targets != -100).sum()), rows, length, kept)
        self.rate.step(self.counter.tokens)
        if self.dropping is not None:
            self.dropping.step()
        return self.counter.finished

    def count(self, real: int, rows: int, length: int, kept: int) -> None:
        """Tokens that are no padding, and floating point operations of all that was computed (backward is twice)."""
        if real == rows * length:
            self.counter.add(rows, length, kept)
        else:  # each token a sequence of its own
            self.counter.add(real, 1)
        whole = DEPTH - self.counter.dropping
        computed = length * whole + kept * self.counter.dropping
        pairs = length**2 * whole + kept**2 * self.counter.dropping
        self.linear += 3 * rows * (24 * DIM**2 * computed + 2 * DIM * self.model.vocab_size * length)
        self.quadratic += 3 * rows * 4 * DIM * pairs

    def figures(self) -> dict[str, float]:
        """What the training took."""
        seconds = time.process_time() - self.start
        return {
            "steps": self.counter.steps,
            "effective tokens": self.counter.tokens,
            "layer tokens": self.counter.layer_tokens,
            "FLOPs, linear in the length": self.linear,
            "FLOPs, quadratic in the length": self.quadratic,
            "CPU seconds": seconds,
        }


# ------------------------------------------------------------------------------------------------------ tinyshakespeare


@functools.cache
def shakespeare() -> tuple[np.ndarray, np.ndarray, int]:
    """Characters' numbers of the first 90 % and the last 10 %, and how many characters there are."""
    text = read_text(first_of(_data() / "lm_text", ["tinyshakespeare.txt.gz", "tinyshakespeare.txt"], "It is missing."))
    characters, ids = np.unique(np.array(list(text)), return_inverse=True)
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(characters)


def windows(ids: np.ndarray, length: int) -> Tensor:
    """(n, length + 1): one after another, each begins with the last character of the one before."""
    count = (len(ids) - 1) // length
    return torch.from_numpy(ids[np.arange(count)[:, None] * length + np.arange(length + 1)])


@torch.inference_mode()
def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats of each token but the first of each row: (n, T + 1) → (n, T)."""
    model.eval()
    return torch.cat(
        [
            cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none").double()
            for part in ids.split(64)
        ]
    )


def train_shakespeare(seed: int, arm: Arm, budget: int) -> dict[str, float]:
    """Windows at random places, the same for all arms of a seed, cut to the step's length."""
    ids, held, vocabulary = shakespeare()
    steps = budget / (BATCH * LENGTH)  # of the baseline
    lengths = linear(arm.shortest, arm.longest, arm.curriculum * steps, 8)
    kept = None if arm.kept == LENGTH else linear(arm.kept, LENGTH, arm.routing * steps, 8)
    most = math.ceil(budget / (BATCH * arm.shortest * min(1, arm.kept / LENGTH)))
    drawn = CurriculumSampler({"length": CurriculumMetric(lengths)}, BATCH, most, seed, samples=len(ids) - LENGTH)
    run = Run(vocabulary, seed, budget, kept)
    for batch in drawn:
        whole = torch.from_numpy(ids[np.array(batch)[:, None] + np.arange(LENGTH + 1)])
        if run.step(truncate_batch(whole, int(batch.difficulties["length"]))):
            break
    figures = run.figures()
    if run.dropping is not None:
        run.dropping.remove()
    each = losses(run.model, windows(held, LENGTH)).mean(0)
    short = losses(run.model, windows(held, 80)).mean()
    places = {f"loss at {a + 1}–{b}": float(each[a:b].mean()) for a, b in itertools.pairwise((0, 16, 32, 64, 96, 128))}
    return {"loss": float(each.mean()), "loss in windows of 80": float(short), **places, **figures}


def shakespeare_runs(budget: int) -> dict[str, list[dict[str, float]]]:
    """Arm → figures of each seed."""
    depends = (pacing, postprocessing, sampler, token_dropping, tokens, gpt)
    kept = Kept("data-efficiency-shakespeare", *depends, Run, Arm, decoder, shakespeare, windows, losses,
                train_shakespeare, *(str(v) for v in SETTINGS.values()))  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in SEEDS:
        for name, arm in ARMS.items():
            train = functools.partial(train_shakespeare, seed, arm, budget)
            found[name].append(kept.once(f"{name} {arm}, {budget}, seed {seed}", train))
    return found


def differences(
    found: dict[str, list[dict[str, float]]], arm: str, against: str = "baseline", figure: str = "loss"
) -> list[float]:
    """A figure of an arm minus that of another, of each seed."""
    return [one[figure] - other[figure] for one, other in zip(found[arm], found[against], strict=True)]


def compared(
    id_: str,
    statement: str,
    source: str,
    found: dict[str, list[dict[str, float]]],
    arm: str,
    settings: dict[str, Any],
    limit: tuple[str, float] = ("<", 0.0),
    gate: bool = True,
    also: Sequence[tuple[str, float, str, float]] = (),
) -> Claim:
    """The worst seed of an arm beside the baseline."""
    paired = differences(found, arm)
    return Claim(
        id=id_,
        statement=statement,
        source=source,
        figure=max(paired),
        unit="nats per token over the baseline, worst of the paired seeds",
        comparison=limit[0],
        threshold=limit[1],
        gate=gate,
        interval95=difference_over_seeds(paired).interval,
        seeds=SEEDS,
        baselines=[
            {"name": f"{figure}, {name}", "figure": statistics.fmean(run[figure] for run in runs)}
            for figure in ("loss", "steps")
            for name, runs in found.items()
        ],
        also=also,
        details={
            "settings": settings,
            "interval95 is of": "the mean difference over the seeds (Student)",
            "paired differences": {name: differences(found, name) for name in found if name != "baseline"},
            "runs": found,
        },
    )


# --------------------------------------------------------------------------------------------------------- us_addresses


class Addresses(NamedTuple):
    """Lines of the addresses, padded to one width."""

    ids: Tensor
    """Training lines (n, LENGTH + 1)."""
    mask: Tensor
    """1 for a token (n, LENGTH + 1)."""
    held: Tensor
    """Lines of every tenth document (n, LENGTH + 1)."""
    held_mask: Tensor
    vocabulary: int
    indexes: dict[str, DifficultyIndex]


METRICS = ("seqlen", "vocab_rarity", "seqlen_vocab_rarity")
PERCENTILES, DEGREE, SHARE, TOKENS = (10, 100), 2, 0.6, 2000


@functools.cache
def addresses() -> Addresses:
    """Every tenth document is held out; byte pairs of the others; each non-empty line is a sample."""
    documents = read_documents(_data() / "lm_text" / "us_addresses.jsonl.gz")
    train = [document for number, document in enumerate(documents) if number % 10]
    pairs = BytePairs(*train_byte_pairs(train, TOKENS), LENGTH, begin=True)

    def lines(chosen: Sequence[str]) -> Sequences:
        return Sequences.rows(
            pairs.begun([line for text in chosen for line in text.split("\n") if line.strip()]), LENGTH
        )

    samples = lines(train)
    fields = TokenFields()
    rarity = VocabularyRarity(len(pairs.vocabulary), fields)
    chosen = [SequenceLength(fields), rarity, Composed([SequenceLength(fields), rarity], LENGTH + 1)]
    with tempfile.TemporaryDirectory(prefix="sparing-addresses-") as folder:  # the indexes stay mapped into memory
        indexes = DataAnalyzer(samples, chosen, folder, collate=pad_sequences).run()
    whole, held = (pad_sequences([part[i] for i in range(len(part))]) for part in (samples, lines(documents[::10])))
    return Addresses(
        whole["input_ids"],
        whole["attention_mask"],
        held["input_ids"],
        held["attention_mask"],
        len(pairs.vocabulary),
        indexes,
    )


def train_addresses(seed: int, metric: str | None, budget: int) -> dict[str, float]:
    """Lines as a curriculum over ``metric`` releases them, or all from the beginning; batches as wide as need be."""
    data = addresses()
    per_line = float((data.mask.sum(1) - 1).double().mean())
    low, high = PERCENTILES
    growing = (
        linear(high, high, 1) if metric is None else root(low, high, SHARE * budget / (BATCH * per_line), 1, DEGREE)
    )
    released = CurriculumMetric(growing, data.indexes[metric or METRICS[0]], "percentile")
    run = Run(data.vocabulary, seed, budget)
    for chosen in CurriculumSampler({"lines": released}, BATCH, math.ceil(budget / BATCH), seed):
        whole = {"input_ids": data.ids[list(chosen)], "attention_mask": data.mask[list(chosen)]}
        batch = trim_batch(whole, multiple=1)
        if run.step(batch["input_ids"], batch["attention_mask"]):
            break
    figures = run.figures()
    nats, real = losses(run.model, data.held), data.held_mask[:, 1:] != 0
    lengths = real.sum(1)
    groups = {
        f"loss of lines of {a + 1}–{b} tokens": nats[among][real[among]]
        for a, b in itertools.pairwise((0, 16, 32, 64, LENGTH))
        for among in [(lengths > a) & (lengths <= b)]
    }
    loss = float(nats[real].mean())
    return {"loss": loss, **{name: float(each.mean()) for name, each in groups.items()}, **figures}


def measure_addresses() -> list[Claim]:
    """Curricula by what lines are, beside none, on the budget of the gates."""
    depends = (pacing, postprocessing, sampler, analysis, index, metrics, tokens, gpt, tokenizing, sequences)
    kept = Kept("data-efficiency-addresses", *depends, Run, decoder, addresses, losses, train_addresses,
                *(str(v) for v in SETTINGS.values()), str((PERCENTILES, DEGREE, SHARE, TOKENS)))  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {"baseline": [], **{name: [] for name in METRICS}}
    for seed in SEEDS:
        for name in found:
            train = functools.partial(train_addresses, seed, None if name == "baseline" else name, BUDGET)
            found[name].append(kept.once(f"{name}, {BUDGET}, seed {seed}", train))
    settings = SETTINGS | {
        "effective tokens": f"{BUDGET}, padding not counted",
        "batch": f"{BATCH} lines, cut to the longest of them",
        "tokens": f"byte pairs, {TOKENS}, made of the training documents; lines are cut to {LENGTH}",
        "curriculum": f"percentiles {PERCENTILES}, root {DEGREE}, over {SHARE:.0%} of the baseline's expected steps",
        "loss": "lines of every tenth document, all tokens, nats per token",
        "examined on": "nothing: the rates are those of tinyshakespeare",
    }
    return [
        compared(
            f"data_efficiency_us_addresses_{name}",
            f"on the addresses a curriculum by {name} ends better than the baseline after the same tokens",
            SHEET,
            found,
            name,
            settings,
            gate=False,
        )
        for name in METRICS
    ]


# --------------------------------------------------------------------------------------------------------------- claims


def measure_gate(arm: str, id_: str, statement: str, limit: tuple[str, float] = ("<", 0.0)) -> list[Claim]:
    settings = SETTINGS | {"effective tokens": BUDGET}
    return [compared(id_, statement, ISSUE, shakespeare_runs(BUDGET), arm, settings, limit)]


def measure_control() -> list[Claim]:
    """The curriculum beside windows that are as short all the time, each where the other can be judged."""
    found, figure = shakespeare_runs(BUDGET), "loss in windows of 80"
    paired = differences(found, "CL", "short", figure)
    return [
        Claim(
            id="data_efficiency_short_control",
            statement="in windows of 80 characters, which both have seen, the curriculum ends better than training on "
            "windows of 80 alone, so that more and shorter steps do not explain what it gains",
            source=SHEET,
            figure=max(paired),
            unit="nats per character over training on windows of 80 alone, worst of the paired seeds",
            comparison="<",
            threshold=0.0,
            gate=False,
            interval95=difference_over_seeds(paired).interval,
            seeds=SEEDS,
            baselines=[
                {"name": f"{name}, {arm}", "figure": statistics.fmean(run[name] for run in runs)}
                for name in (figure, "loss", "loss at 97–128", "steps")
                for arm, runs in found.items()
            ],
            details={
                "settings": SETTINGS | {"effective tokens": BUDGET},
                "paired differences": paired,
                "of the whole loss, in windows of 128": differences(found, "CL", "short"),
                "note": "a model of windows of 80 has never seen the places behind them",
            },
        )
    ]


def measure_budget(budget: int, id_: str) -> list[Claim]:
    """The three comparisons at a budget that the gates are not judged at."""
    found = shakespeare_runs(budget)
    statement = (
        f"with {budget / 1e6:g} M effective tokens, too, a curriculum and a curriculum with token dropping are better "
        "than the baseline in every paired seed, and token dropping alone no more than 0.03 nats worse"
    )
    also = [
        ("CL+LTD over the baseline, worst of the seeds", max(differences(found, "CL+LTD")), "<", 0.0),
        ("LTD over the baseline, worst of the seeds", max(differences(found, "LTD")), "<=", 0.03),
    ]
    settings = SETTINGS | {"effective tokens": budget}
    return [compared(id_, statement, SHEET, found, "CL", settings, gate=False, also=also)]


def _data() -> Path:
    return Path(os.environ["SPARING_DATA"])


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    "curriculum": functools.partial(
        measure_gate,
        "CL",
        "curriculum",
        "a curriculum over lengths (windows cut to 32 characters, growing to 128 over 60 % of the steps) ends better "
        "than the baseline after the same effective tokens",
    ),
    "curriculum_ltd": functools.partial(
        measure_gate,
        "CL+LTD",
        "curriculum_ltd",
        "a curriculum over lengths with token dropping ends better than the baseline after the same effective tokens",
    ),
    "ltd_no_worse": functools.partial(
        measure_gate,
        "LTD",
        "ltd_no_worse",
        "token dropping in the four middle layers (64 of 128 tokens, growing to all over 90 % of the steps) ends no "
        "more than 0.03 nats worse than the baseline after the same effective tokens",
        ("<=", 0.03),
    ),
    "short_control": measure_control,
    "pilot_budget": functools.partial(measure_budget, PILOT, "data_efficiency_pilot_budget"),
    "us_addresses": measure_addresses,
    "longer_budget": functools.partial(measure_budget, LONGER, "data_efficiency_longer_budget"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main("data_efficiency_lm", BENCHMARKS))
