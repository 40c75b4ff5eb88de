"""The guards every other test relies on do guard."""

import os
import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text()
SHAPES = (Path(__file__).parents[1] / "shapes.py").read_text()


def test_a_foreign_address_is_refused():
    with socket.socket() as outgoing, pytest.raises(RuntimeError, match=r"192\.0\.2\.1.*without a network"):
        outgoing.connect(("192.0.2.1", 80))


def test_a_foreign_name_is_refused():
    with socket.socket() as outgoing, pytest.raises(RuntimeError, match="example"):
        outgoing.connect_ex(("example.invalid", 443))


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_each_test_has_an_empty_store_of_its_own(store_folder, tmp_path):
    assert os.environ["SPARING_STORE"] == str(store_folder)
    assert store_folder.parent == tmp_path
    assert not store_folder.exists()


@pytest.mark.parametrize(("ci", "outcome"), [("", {"skipped": 1}), ("true", {"errors": 1})])
def test_absent_data_skip_at_home_and_fail_in_ci(pytester, monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("SPARING_DATA", "/nonexistent")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_it(data_root): pass")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines("*SPARING_DATA names no folder*")


def test_oracles_are_read_from_the_named_folder_and_must_exist(pytester):
    (pytester.path / "elsewhere" / "known").mkdir(parents=True)
    (pytester.path / "elsewhere" / "known" / "case.npz").touch()
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        def test_known(oracles): assert [file.name for file in oracles("known")] == ["case.npz"]
        def test_unknown(oracles): oracles("unknown")
        """
    )
    result = pytester.runpytest_subprocess("--oracles", "elsewhere")
    result.assert_outcomes(passed=1, failed=1)


def test_shapes_flag_checks_annotations(pytester):
    pytester.makepyfile(shapes=SHAPES)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest

        def test_wrong_shape():
            import numpy
            from sparing.core.metrics import correct
            with pytest.raises(Exception) as caught:
                correct(numpy.zeros((3, 2)), numpy.zeros(4, dtype=int))
            assert type(caught.value).__name__ == "TypeCheckError", caught.value
        """
    )
    pytester.runpytest_subprocess("--shapes").assert_outcomes(passed=1)
    pytester.runpytest_subprocess().assert_outcomes(failed=1)
