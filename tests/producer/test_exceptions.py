"""The exceptions are those that the published SDK lists, with the attributes that it lists."""

from __future__ import annotations

import pickle
from typing import Dict, Type

import pytest

import plarv
from plarv import exceptions
from plarv.exceptions import (
    ArgusApiError,
    ArgusAuthenticationError,
    ArgusCheckpoint,
    ArgusConfigurationError,
    ArgusConnectionError,
    ArgusError,
    ArgusHalt,
    ArgusIntervention,
    ArgusPause,
    ArgusRateLimitError,
    ArgusServerError,
)

PARENTS: Dict[Type[ArgusError], Type[Exception]] = {
    ArgusError: Exception,
    ArgusConfigurationError: ArgusError,
    ArgusConnectionError: ArgusError,
    ArgusApiError: ArgusError,
    ArgusAuthenticationError: ArgusApiError,
    ArgusRateLimitError: ArgusApiError,
    ArgusServerError: ArgusApiError,
    ArgusIntervention: ArgusError,
    ArgusPause: ArgusIntervention,
    ArgusCheckpoint: ArgusIntervention,
    ArgusHalt: ArgusIntervention,
}


@pytest.mark.parametrize("kind", PARENTS, ids=lambda kind: kind.__name__)
def test_the_tree_is_the_published_one(kind: Type[ArgusError]) -> None:
    assert kind.__mro__[1] is PARENTS[kind]
    assert getattr(plarv, kind.__name__) is kind
    assert kind.__name__ in exceptions.__all__


def test_there_are_no_others() -> None:
    assert sorted(exceptions.__all__) == sorted(kind.__name__ for kind in PARENTS)


def test_an_intervention_carries_its_step_and_the_action_behind_it() -> None:
    error = ArgusPause("enough", 1840, {"kind": "PAUSE"})
    assert (str(error), error.step, error.response) == ("enough", 1840, {"kind": "PAUSE"})
    assert (ArgusHalt("no more").step, ArgusHalt("no more").response) == (None, {})


def test_an_api_error_carries_status_code_and_response() -> None:
    error = ArgusRateLimitError("slower", 429, {"retry_after": 3})
    assert (error.status_code, error.response) == (429, {"retry_after": 3})
    assert ArgusServerError("down").status_code is None


def test_a_configuration_error_names_parameter_rule_and_value_and_is_a_value_error() -> None:
    error = ArgusConfigurationError("mode", "must be 'MANUAL' or 'AUTO'", "FAST")
    assert isinstance(error, ValueError)
    assert (error.parameter, error.rule, error.value) == (
        "mode",
        "must be 'MANUAL' or 'AUTO'",
        "FAST",
    )
    assert str(error) == "mode must be 'MANUAL' or 'AUTO', not 'FAST'"


@pytest.mark.parametrize(
    "error",
    [
        ArgusPause("enough", 1840, {"kind": "PAUSE"}),
        ArgusConfigurationError("mode", "must be 'MANUAL' or 'AUTO'", "FAST"),
        ArgusServerError("down", 503, "busy"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_through_a_process_pool_whole(error: ArgusError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
