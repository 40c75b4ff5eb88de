"""Questions whose answer is a span of a passage: SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.core.errors import DataError, shown
from sparing.data.root import Source
from sparing.data.text import first_of, read_text

SQUAD = Source(
    "squad",
    "Questions on Wikipedia passages, answered by spans of them (Rajpurkar et al. 2016)",
    "CC BY-SA 4.0",
    "https://rajpurkar.github.io/SQuAD-explorer/",
    (),
    made="train-v1.1.json and dev-v1.1.json, gzipped or not, belong into {path}.",
)


@dataclass(frozen=True)
class Question:
    """A question, the passage that answers it, and the answers people gave: (text, first character in the passage)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read_published(root: Path, train: bool) -> list[Question]:
    """The questions of the official training or development file under the data root."""
    names = [f"{'train' if train else 'dev'}-v1.1.json{end}" for end in ("", ".gz")]
    return read_squad(first_of(SQUAD.folder(root), names, SQUAD.how_to_place(root)))


def read_squad(path: Path) -> list[Question]:
    """The questions of a file, gzipped or plain, in the official layout or word-tokenised.

    Official: ``data → paragraphs → qas → answers {text, answer_start}``. Word-tokenised: ``contexts`` (tokens separated
    by spaces) and ``examples`` [number of the context, question, first and last token of the answer]; one whose answer
    is empty (the last token is that before the first) cannot be learned from and is left out. Raises
    :class:`DataError` naming the place inside the file, for an answer that does not stand where it says too.
    """
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: is no JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        questions = _official(found["data"], str(path))
    elif isinstance(found, dict) and isinstance(found.get("examples"), list):
        questions = _tokenised(found, str(path))
    else:
        raise DataError(f'{path}: neither "data" nor "contexts" and "examples" in it; a file of SQuAD v1.1 is expected')
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def _part(holder: Any, key: str | int, kind: type, where: str) -> Any:
    try:
        found = holder[key]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"{where}: has no {key!r}") from None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise DataError(f"{where}: {key!r} is {shown(found, 60)}; a {kind.__name__} is expected")
    return found


def _official(data: Sequence[Any], where: str) -> list[Question]:
    questions = []
    for a, article in enumerate(data):
        for p, paragraph in enumerate(_part(article, "paragraphs", list, f"{where}: data[{a}]")):
            place = f"{where}: data[{a}].paragraphs[{p}]"
            context = _part(paragraph, "context", str, place)
            for q, entry in enumerate(_part(paragraph, "qas", list, place)):
                here = f"{place}.qas[{q}]"
                answers = []
                for n, answer in enumerate(_part(entry, "answers", list, here)):
                    text = _part(answer, "text", str, f"{here}.answers[{n}]")
                    start = _part(answer, "answer_start", int, f"{here}.answers[{n}]")
                    if not text or start < 0 or context[start : start + len(text)] != text:
                        raise DataError(
                            f"{here}.answers[{n}]: {shown(text, 60)} does not stand at character {start} of the context"
                        )
                    answers.append((text, start))
                if not answers:
                    raise DataError(f"{here}: has no answer; in version 1.1 every question has one")
                questions.append(
                    Question(
                        str(_part(entry, "id", str, here)), _part(entry, "question", str, here), context, tuple(answers)
                    )
                )
    return questions


def _tokenised(found: dict[str, Any], where: str) -> list[Question]:
    contexts = _part(found, "contexts", list, where)
    questions = []
    for number, row in enumerate(found["examples"]):
        here = f"{where}: examples[{number}]"
        index = _part(row, 0, int, here)
        if not 0 <= index < len(contexts):
            raise DataError(f"{here}: the context {index}; 0…{len(contexts) - 1} is expected")
        context = _part(contexts, index, str, where)
        words = context.split(" ")
        first, last = _part(row, 2, int, here), _part(row, 3, int, here)
        if first == last + 1:
            continue
        if not 0 <= first <= last < len(words):
            raise DataError(f"{here}: the tokens {first}…{last}; a span in 0…{len(words) - 1} is expected")
        start = sum(len(word) + 1 for word in words[:first])
        answer = " ".join(words[first : last + 1])
        questions.append(Question(f"{number}", _part(row, 1, str, here), context, ((answer, start),)))
    return questions
