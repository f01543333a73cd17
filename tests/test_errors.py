"""Errors that a user can mend are shown as their message and nothing else."""

import inspect
import multiprocessing
import pickle
import sys
from importlib.metadata import version

import pytest
from vllm.v1.engine import utils as vllm_engine

from vllm_metal.errors import (
    ENGINE_FAILED,
    ChangedLibraryError,
    UserError,
    show_user_errors_without_stack,
    user_errors_end_child_process,
)


def test_the_message_lists_every_reason():
    error = UserError("It cannot be served", ["one", "two"])
    assert str(error) == "vllm_metal: It cannot be served:\n  - one\n  - two"
    assert error.reasons == ["one", "two"]


def test_a_message_without_reasons_is_a_sentence():
    assert str(UserError("There is no model")) == "vllm_metal: There is no model."


def test_pydantic_does_not_wrap_it():
    assert not isinstance(UserError("x"), ValueError)


def test_it_survives_the_way_between_processes():
    error = UserError("It cannot be served", ["one"])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reasons) == (str(error), ["one"])


@pytest.fixture
def hook(monkeypatch):
    """The exception hook as `register` installs it, over one that only takes notes."""
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: others.append(arguments))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    show_user_errors_without_stack()
    hook = sys.excepthook
    hook.others = others
    return hook


def test_a_user_error_ends_with_its_message(hook, capsys):
    error = UserError("It cannot be served", ["one"])
    hook(UserError, error, None)
    assert capsys.readouterr().err == f"{error}\n"
    assert hook.others == []


def test_any_other_error_keeps_its_stack(hook, capsys):
    error = ValueError("x")
    hook(ValueError, error, None)
    assert capsys.readouterr().err == ""
    assert hook.others == [(ValueError, error, None)]


def test_the_parent_of_a_failed_engine_says_so_in_one_line(hook, capsys):
    error = RuntimeError("Engine core initialization failed. See root cause above.")
    hook(RuntimeError, error, None)
    assert capsys.readouterr().err == f"{error}\n"


def test_another_programs_engine_failure_keeps_its_stack(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: others.append(arguments))
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    show_user_errors_without_stack()
    sys.excepthook(RuntimeError, RuntimeError("Engine core initialization failed."), None)
    assert len(others) == 1


def fail(error: Exception) -> None:
    """What an engine process does when its start fails."""
    with user_errors_end_child_process():
        raise error


@pytest.mark.nightly
@pytest.mark.parametrize("error", [UserError("Too little memory"), ValueError("bug")], ids=repr)
def test_the_end_of_an_engine_process(error, capfd):
    process = multiprocessing.get_context("spawn").Process(target=fail, args=(error,))
    process.start()
    process.join()
    shown = capfd.readouterr().err
    assert process.exitcode == 1
    assert str(error) in shown
    assert ("Traceback" in shown) == isinstance(error, ValueError)


def test_vllm_still_reports_a_failed_engine_in_the_words_that_the_hook_knows():
    source = inspect.getsource(vllm_engine)
    assert ENGINE_FAILED in source, f"vllm {version('vllm')}: {vllm_engine.__name__}"


def test_a_changed_library_is_named_with_its_version():
    error = ChangedLibraryError("numpy", "numpy.asarray", "it does not exist")
    assert f"numpy {version('numpy')} has changed numpy.asarray" in str(error)
    assert error.reasons[0] == "it does not exist"
    assert "install a version of numpy" in error.reasons[1]
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (ChangedLibraryError, str(error))


def test_in_the_users_own_process_the_error_passes_through():
    with pytest.raises(UserError):
        fail(UserError("Too little memory"))
