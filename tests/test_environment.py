"""The three files that say what to install agree, and name what the code imports."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diclip.settings import ROOT

CONDA_NAMES = {"torch": "pytorch", "opencv-python-headless": "py-opencv"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges(lines: list[str]) -> dict[str, str]:
    found = map(Requirement, lines)
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in found}


def test_environment_yml_is_pyproject_in_condas_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert pip["pip"][-1] == "-e ."
    asked = ranges(PROJECT["dependencies"]) | {"python": PROJECT["requires-python"], "pip": ""}
    from_pip = ranges(pip["pip"][:-1])
    assert from_pip.items() <= asked.items()
    expected = {CONDA_NAMES.get(name, name): asked[name] for name in asked.keys() - from_pip.keys()}
    assert ranges(conda) == expected


def test_constraints_are_sorted_and_within_the_ranges():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=lambda line: line.lower().split("=="))
    tested = {name: pin.removeprefix("==") for name, pin in ranges(lines).items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras["test"] + extras["crf"]):
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement


def test_every_import_is_a_dependency():
    imported = set()
    for path in (ROOT / "diclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module)
    tops = {re.split(r"\.", name)[0] for name in imported} - set(sys.stdlib_module_names) - {"diclip"}
    optional = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    known = ranges(PROJECT["dependencies"] + optional)
    owners = packages_distributions()
    missing = {top for top in tops if not {canonicalize_name(name) for name in owners.get(top, [])} & known.keys()}
    assert missing <= {"pydensecrf", "ray"}  # of the optional pydensecrf2 and ray, which need not be installed here
