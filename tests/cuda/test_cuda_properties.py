"""The property space and the golden cases of the CPU path, on a GPU."""

import pytest

pytest.importorskip("hypothesis")

import test_golden as golden
import test_properties as properties
from cases import DEVICE
from hypothesis import given, settings

pytestmark = pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use")


@settings(max_examples=150, deadline=None)
@given(**properties.APPLY)
def test_apply(**case):
    properties.check_apply(DEVICE, **case)


@settings(max_examples=150, deadline=None)
@given(**properties.MODULE)
def test_module(**case):
    properties.check_module(DEVICE, **case)


@pytest.mark.parametrize("layout", ["record", "split"])
@pytest.mark.parametrize("path", golden.CASES, ids=lambda p: p.stem)
def test_golden(path, layout, device):
    golden.through_the_module(path, layout, device)
