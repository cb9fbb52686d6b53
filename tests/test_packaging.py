"""What gets installed: under which names, with which pins. Needs the environment that tools/setup.sh makes."""

import sysconfig
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed() -> Distribution:
    # Only site-packages: the build leaves an egg-info in the repository root, which would pass for an installation.
    found = list(Distribution.discover(name="megatron-safe", path=[sysconfig.get_path("purelib")]))
    assert len(found) == 1, "megatron-safe is not installed here: bash tools/setup.sh"
    return found[0]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Package name -> specifier, as far as it applies to this Python."""
    lines = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    assert len({canonicalize_name(r.name) for r in here}) == len(here), "a package is pinned twice"
    return {canonicalize_name(r.name): str(r.specifier) for r in here}


def test_constraints_pin_torch_and_megatron_core(pins):
    assert pins["torch"] == "==2.13.0"
    assert pins["megatron-core"] == "==0.16.1"


def test_all_we_install_is_pinned_exactly(pins, installed):
    requirements = [Requirement(text) for text in installed.requires]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": "test"})]
    assert {"torch", "pytest"} <= {r.name for r in wanted}
    for requirement in wanted:
        pin = pins.get(canonicalize_name(requirement.name), "none")
        assert pin.startswith("=="), f"{requirement.name} is pinned in tools/constraints.txt by: {pin}"
        assert requirement.specifier.contains(pin.removeprefix("==")), f"{requirement} excludes its own pin {pin}"


def test_kernels_are_a_part_of_megatron_safe(installed):
    # As spelled, not resolved: a link at megatron_safe/kernels would hide that the mapping in setup.py is not used.
    assert Path(find_spec("megatron_safe.kernels").origin) == ROOT / "kernels" / "__init__.py"
    assert installed.read_text("top_level.txt").split() == ["megatron_safe"]


def test_console_script(installed):
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == {"megatron-safe": "megatron_safe.cli:main"}


def test_version_is_the_one_in_the_source(installed):
    source = (ROOT / "megatron_safe" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{installed.version}"' in source
