"""The error tree: whose fault it is, what the message says, and that errors travel."""

import pickle

import pytest

import lmopt
from lmopt import LmoptError, explain

CLASSES = [
    one for one in vars(lmopt).values() if isinstance(one, type) and issubclass(one, LmoptError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_ours_fits_a_built_in_and_pickles_with_its_facts(kind):
    error = kind("what", "value", "this", "do that", status=401, extra_fact=[1])
    assert str(error) == "what: 'value'; expected this; do that"
    assert kind is LmoptError or len(kind.__mro__) > len(LmoptError.__mro__)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.status, again.extra_fact) == (str(error), 401, [1])


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (lmopt.SignatureError, ValueError),
        (lmopt.ParamsError, ValueError),
        (lmopt.DataError, ValueError),
        (lmopt.ParseError, ValueError),
        (lmopt.LMError, RuntimeError),
        (lmopt.Unauthorized, PermissionError),
        (lmopt.LMTimeout, TimeoutError),
        (lmopt.BudgetExceeded, RuntimeError),
        (lmopt.ReplayMiss, LookupError),
    ],
)
def test_each_class_is_also_the_built_in_that_fits(kind, fits):
    assert issubclass(kind, fits)


def test_a_long_value_is_cut():
    assert len(explain("what", "x" * 10_000, "this", "that")) < 250
