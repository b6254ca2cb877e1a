"""The tests' commands are copies of a Python that is warm: each would else pay for seconds of imports."""

from __future__ import annotations

import importlib

from tests.helpers import gpus
from tests.helpers.harness import clean_environment
from tests.helpers.warm_interpreter import early_of, interpreter_for


def test_what_libraries_put_into_the_environment_does_not_count() -> None:
    importlib.import_module("sklearn")
    assert interpreter_for(["-m", "recipes.ddp"], clean_environment())


def test_other_variables_that_are_read_early_do() -> None:
    assert early_of({"TORCH_LOGS": "all", "HOME": "/"}) == {"TORCH_LOGS": "all"}
    assert interpreter_for(["-m", "recipes.ddp"], clean_environment() | {"TORCH_LOGS": "all"}) is None
    assert interpreter_for(["-c", "pass"], clean_environment()) is None


def test_a_command_on_emulated_gpus_is_a_copy_too() -> None:
    one, two = (clean_environment() | gpus.emulated(count) for count in (1, 2))
    assert interpreter_for(["-m", "recipes.ddp"], one) is interpreter_for(["-m", "recipes.ddp"], two) is not None
