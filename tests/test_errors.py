"""Errors that a user can mend are shown as their message and nothing else."""

import logging
import pickle
import sys

import pytest

from vllm_metal.errors import UserError, show_user_errors_without_stack


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
    logger = logging.getLogger("vllm.v1.engine.core")
    monkeypatch.setattr(logger, "filters", [])
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
    monkeypatch.setattr(logging.getLogger("vllm.v1.engine.core"), "filters", [])
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: others.append(arguments))
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    show_user_errors_without_stack()
    sys.excepthook(RuntimeError, RuntimeError("Engine core initialization failed."), None)
    assert len(others) == 1


@pytest.mark.parametrize("error", [UserError("Too little memory"), ValueError("bug")], ids=repr)
def test_vllms_start_up_log(hook, error):
    """The engine logs why it fails with a stack; a user error loses it there."""
    lines = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    logger, handler = logging.getLogger("vllm.v1.engine.core"), Lines()
    logger.addHandler(handler)
    try:
        try:
            raise error
        except Exception:
            logger.exception("EngineCore failed to start.")
    finally:
        logger.removeHandler(handler)
    [line] = lines
    assert ("Traceback" in line) == isinstance(error, ValueError)
    assert str(error) in line
    if isinstance(error, UserError):
        assert line == str(error)
