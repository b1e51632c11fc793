"""Every example in a docstring is executed."""

import doctest
import importlib
import pkgutil

import fedcore
import fedcore_theory
from tests.transports.nvflare_stand_in import install


def test_examples_say_what_happens():
    # The extra nvflare is not among those that the tests bring.
    install()
    attempted = 0
    for package in (fedcore, fedcore_theory):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
            assert result.failed == 0, info.name
            attempted += result.attempted
    assert attempted > 0
