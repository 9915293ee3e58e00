"""What is installed and what importing it costs."""

import importlib
import json
import subprocess
import sys
from importlib.metadata import distribution, entry_points

import pytest

import ddn_solvers as ddn
from ddn_solvers.adapter import Adapter, Capabilities

HEAVY = ("cvxpy", "casadi", "scipy.optimize", "ddn_adapters", "matplotlib", "sklearn")


def modules_after(statement: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter after a statement."""
    program = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(ddn.__all__) == list(ddn.__all__)
    assert len(set(ddn.__all__)) == len(ddn.__all__)
    for name in ddn.__all__:
        assert getattr(ddn, name).__doc__, name


def test_the_contracts_names_are_public() -> None:
    expected = {
        "Certificate", "DeclarativeLayer", "Policy", "Problem", "Sensitivity", "Solution", "Status",
        "attach", "backends", "compile", "least_squares", "linear_program", "quadratic_program", "register",
        "sensitivity", "solve",
    }  # fmt: skip
    assert expected <= set(ddn.__all__)


def test_every_error_and_warning_has_one_root() -> None:
    raised = [
        value for value in vars(ddn).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert raised
    assert all(issubclass(error, (ddn.DDNError, ddn.DDNWarning)) for error in raised)
    assert issubclass(ddn.ProblemError, ValueError)


def test_importing_the_library_loads_no_backend() -> None:
    loaded = modules_after("import ddn_solvers")
    assert not loaded & set(HEAVY)


def test_listing_backends_loads_none() -> None:
    loaded = modules_after("import ddn_solvers\nassert ddn_solvers.backends()")
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("backend", ["casadi", "cvxpy", "scipy"])
def test_loading_one_adapter_loads_no_other(backend: str) -> None:
    loaded = modules_after(f"from ddn_solvers import registry\nregistry.adapter({backend!r})")
    assert f"ddn_adapters.{backend}_" in loaded
    assert {name for name in loaded if name.startswith("ddn_adapters.")} == {f"ddn_adapters.{backend}_"}
    assert not loaded & {"casadi", "cvxpy", "scipy.optimize"}  # the package itself comes with the first solve


@pytest.mark.parametrize("point", entry_points(group="ddn_solvers.adapters"), ids=lambda point: point.name)
def test_entry_points_resolve_to_adapters(point) -> None:
    found = point.load()
    assert issubclass(found, Adapter)
    assert isinstance(found.capabilities, Capabilities)
    names = [method.name for method in found.capabilities.methods]
    assert names
    assert len(set(names)) == len(names)


def test_the_built_in_backends_are_registered_by_entry_points() -> None:
    assert {point.name for point in entry_points(group="ddn_solvers.adapters")} >= {
        "casadi",
        "cvxpy",
        "scipy",
    }


def test_metadata_agrees_with_the_package() -> None:
    metadata = distribution("ddn-solvers").metadata
    assert metadata["Version"] == ddn.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    for package in ("ddn_solvers", "ddn_adapters"):
        assert importlib.import_module(package).__doc__
