"""What is saved comes back; what was damaged is refused."""

import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, SparingError
from sparing.core.ledger import FILE, OUTCOMES, Figure, Ledger, Picture, Row, json_schema

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBER = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def figures(draw):
    value = draw(st.none() | NUMBER | TEXT)
    bounds = draw(st.none() | st.tuples(NUMBER, NUMBER))
    return Figure(
        value,
        draw(st.sampled_from(["", "B", "ms", "MiB"])),
        "n.a." if value is None else draw(st.sampled_from(["measured", "est", "derived"])),
        draw(st.sampled_from(["lower", "higher", ""])),
        None if bounds is None else tuple(sorted(bounds)),
        draw(TEXT),
    )


@st.composite
def pictures(draw):
    shape = draw(st.sampled_from([(1, 1), (2, 3), (3, 2, 3)]))
    return Picture.of(np.full(shape, draw(st.integers(0, 255)), np.uint8), "c" + draw(TEXT))


@st.composite
def rows(draw, row_id, depth=0):
    sub = (
        st.dictionaries(TEXT, st.lists(rows("inner", depth + 1), max_size=2), max_size=1) if depth == 0 else st.just({})
    )
    return Row(
        id=row_id,
        step=draw(TEXT),
        stage="model",
        task=draw(TEXT),
        seed=draw(st.integers(0, 2)),
        headline="accuracy",
        runtime="onnxruntime",
        kind="onnx",
        figures=draw(st.dictionaries(TEXT, figures(), max_size=3)),
        outcome=draw(TEXT),
        by_class=draw(st.dictionaries(TEXT, st.floats(0, 1), max_size=2)),
        curves=draw(st.dictionaries(TEXT, st.lists(st.tuples(NUMBER, NUMBER), max_size=3), max_size=1)),
        pictures=draw(st.dictionaries(TEXT, pictures(), max_size=2)),
        candidates=draw(st.lists(st.dictionaries(TEXT, PLAIN, max_size=2), max_size=2)),
        remarks=draw(st.lists(TEXT, max_size=2)),
        sub=draw(sub),
        config=draw(st.dictionaries(TEXT, PLAIN, max_size=2)),
    )


@st.composite
def ledgers(draw):
    ledger = Ledger(
        name=draw(TEXT),
        recipe=draw(TEXT),
        environment=draw(st.dictionaries(TEXT, PLAIN, max_size=2)),
        stopped=draw(TEXT),
    )
    for row_id in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=3)):
        values = draw(st.none() | st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5) | st.just([1, 0, 1]))
        ledger.add(draw(rows(row_id)), None if values is None else np.array(values))
    return ledger


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ledger = Ledger(name="quick", recipe="task: digits\n", environment={"cores": 2}, tasks={"digits": "abc"})
    for row_id, accuracy in (("baseline", 0.75), ("quantize", 0.5)):
        row = Row(
            row_id, "train", "model", "digits", 0, "accuracy", "onnxruntime", "onnx",
            {"accuracy": Figure(accuracy, better="higher", interval=(0.2, 0.9)), "model bytes": Figure(1234, "B")},
            curves={"loss": [(1, 2.5), (2, 1.5)]},
            config={"epochs": 3},
        )  # fmt: skip
        ledger.add(row, np.arange(4) < 4 * accuracy)
    ledger.save(folder)
    return folder


def copy(saved, folder):
    folder.mkdir(exist_ok=True)
    for name in (FILE, OUTCOMES):
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


@given(ledgers())
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path_factory, ledger):
    folder = tmp_path_factory.mktemp("ledger")
    ledger.save(folder)
    found = Ledger.load(folder)
    assert found.document() == ledger.document()
    assert found.digest() == ledger.digest()
    assert [list(row.figures) for row in found.rows] == [list(row.figures) for row in ledger.rows]  # display order
    assert found.outcomes.keys() == ledger.outcomes.keys()
    assert all(np.array_equal(found.outcomes[name], ledger.outcomes[name]) for name in ledger.outcomes)


def test_loaded_rows_are_equal(saved):
    ledger = Ledger.load(str(saved))  # as people write it
    assert ledger.rows[0].figures["accuracy"] == Figure(0.75, better="higher", interval=(0.2, 0.9))
    assert type(ledger.rows[0].figures["model bytes"].value) is int
    assert ledger.rows[0].curves == {"loss": [(1.0, 2.5), (2.0, 1.5)]}
    found = ledger.difference("baseline", "quantize")
    assert found is not None
    assert found.value == -0.25


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_harmless(saved, tmp_path_factory, data):
    folder = copy(saved, tmp_path_factory.mktemp("damaged"))
    target = folder / data.draw(st.sampled_from([FILE, OUTCOMES]))
    content = bytearray(target.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    target.write_bytes(content)
    try:
        found = Ledger.load(folder)
    except SparingError:
        return
    # a flipped bit may leave valid JSON with another text or number in it, but never other outcomes under old names
    original = Ledger.load(saved)
    for name, values in found.outcomes.items():
        assert name not in original.outcomes or np.array_equal(values, original.outcomes[name])
    found.save(folder)


@given(PLAIN, st.data())
def test_any_value_anywhere_is_refused_or_read(saved, tmp_path_factory, value, data):
    folder = copy(saved, tmp_path_factory.mktemp("foreign"))
    document = json.loads((folder / FILE).read_text())
    place = document
    while True:
        name = data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else len(place) - 1
        if isinstance(place[name], dict | list) and place[name] and data.draw(st.booleans()):
            place = place[name]
            continue
        place[name] = value
        break
    (folder / FILE).write_text(json.dumps(document))
    with contextlib.suppress(SparingError):
        Ledger.load(folder).canonical()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2; this release reads 1"),
        (lambda text: text.replace('"version": 1', '"version": true'), "version True"),
        (lambda text: text.replace('"version": 1,', ""), "'version' is missing"),
        (lambda text: text.replace('"version": 1,', '"version": 1, "version": 1,'), "'version' appears twice"),
        (lambda text: text.replace("0.75", "NaN", 1), "NaN"),
        (lambda text: text.replace("0.75", "1e999", 1), "1e999 is too large"),
        (lambda text: text.replace("0.75", '"0.75', 1), "not valid JSON"),
        (lambda text: text.replace('"epochs": 3', '"epochs": 1e999', 1), "1e999 is too large"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"', 1), r"rows\.0\.seed"),
        (lambda text: text.replace('"seed": 0', '"sead": 0', 1), r"rows\.0\.sea?e?d"),
        (lambda text: text.replace('"quantize"', '"baseline"', 1), "already has a row 'baseline'"),
        (lambda text: text.replace('"id": "quantize"', '"id": "other"', 1), "rows it does not have: 0/quantize"),
        (lambda text: text.replace('"better": "higher"', '"better": "up"', 1), "better"),
        (lambda text: text.replace("0.9", "0.1", 1), "lower first"),
        (lambda text: "[" * 100_000, "not valid JSON"),
        (lambda text: "[]", "'version' is missing"),
        (lambda text: text.replace('"quick"', '"\\ud800"'), "ledger.json"),
        (lambda text: "", "not valid JSON"),
    ],
)  # fmt: skip
def test_named_damage(saved, tmp_path, change, message):
    folder = copy(saved, tmp_path / "run")
    text = (folder / FILE).read_text()
    changed = change(text)
    assert changed != text
    (folder / FILE).write_text(changed)
    with pytest.raises(CorruptFile, match=message):
        Ledger.load(folder)


def test_outcomes_of_another_run_are_refused(saved, tmp_path):
    folder = copy(saved, tmp_path / "run")
    arrays = files.read_arrays(folder / OUTCOMES)
    files.write_arrays(folder / OUTCOMES, arrays | {"0/quantize": ~arrays["0/quantize"]})
    with pytest.raises(CorruptFile, match="0/quantize are not those that were written"):
        Ledger.load(folder)
    files.write_arrays(folder / OUTCOMES, {"0/baseline": arrays["0/baseline"]})
    with pytest.raises(CorruptFile, match="0/quantize are missing"):
        Ledger.load(folder)
    (folder / OUTCOMES).unlink()
    with pytest.raises(CorruptFile, match="missing"):
        Ledger.load(folder)


def test_a_kill_between_the_two_files_leaves_a_readable_ledger(saved, tmp_path, monkeypatch):
    folder = copy(saved, tmp_path / "run")
    ledger = Ledger.load(folder)
    ledger.add(Row("more", "s", "model", "digits", 0, "accuracy", "r", "k", {}), np.ones(4))

    def die(stage, target):
        if (stage, target.name) == ("write", FILE):
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "fault_hook", die)
    with pytest.raises(KeyboardInterrupt):
        ledger.save(folder)
    monkeypatch.setattr(files, "fault_hook", None)
    assert Ledger.load(folder).ids == ("baseline", "quantize")


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    ledger = Ledger(environment={"x": math.nan})
    with pytest.raises(InvalidValue, match="cannot be written"):
        ledger.save(tmp_path)
    ledger = Ledger()
    ledger.add(Row("a", "s", "model", "t", 0, "h", "r", "k", {}, config={"f": object()}))
    with pytest.raises(InvalidValue, match="cannot be written"):
        ledger.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_schema_names_every_entry_of_a_saved_ledger(saved):
    schema = json_schema()
    document = json.loads((saved / FILE).read_text())
    assert schema["properties"].keys() == document.keys()
    assert schema["$defs"]["Row"]["properties"].keys() == document["rows"][0].keys()
    assert schema["$defs"]["Figure"]["properties"].keys() == document["rows"][0]["figures"]["accuracy"].keys()
    assert schema["properties"]["version"]["const"] == 1
    assert "UTC" in schema["properties"]["created"]["description"]


def test_json_holds_the_summary(saved):
    value = Ledger.load(saved).to_json()
    json.dumps(value, allow_nan=False)
    assert value["summary"][1]["to_first"]["value"] == -0.25
    assert value["summary"][1]["ratios"]["model bytes"]["value"] == 1.0
