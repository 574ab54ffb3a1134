"""Full-size networks by scripts/ten_networks.py, which does them all: no fault, 0 codes differ."""

import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "ten_networks.py"
# One or two of each family, so that they take minutes: the script does all seventeen.
CHOSEN = {
    "mobilenet_v1_0.25_128": 10,
    "mobilenet_v2_1.4_224": 2,
    "nasnet_mobile": 1,
    "inception_v3": 1,
    "resnet_v1_50": 2,
    "resnet_v2_152": 1,
    "resnet_v1_34": 1,
    "efficientnet_lite4": 1,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("ten_networks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CHOSEN)
def test_a_full_size_network_has_no_fault_and_its_kernels_codes(script, name):
    row = script.measure(name, CHOSEN[name])
    assert row["faults"] == 0 and row["batch_norms_left"] == 0
    assert row["differing_nodes"] == ""
    assert row["xnnpack_differing"] == row["reference_differing"] == 0
    assert row["least_distinct"] >= script.DISTINCT
