"""environment.yml, pyproject.toml and constraints.txt say the same; no conda is needed to check it."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lookalike import paths

ROOT = paths.project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))


def pins(name):
    """{package: version} of a lock."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [line.split(";")[0].strip().split("==") for line in lines if re.match(r"[A-Za-z0-9]", line)]
    return {canonicalize_name(package): version for package, version in found}


PINS, FEDERATED_PINS = pins("constraints.txt"), pins("constraints-federated.txt")


def pip_lines():
    """The lines of environment.yml that pip reads."""
    (block,) = [item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict)]
    return block


def all_requirements():
    """Those of the one lock; Flower asks for other versions of the command line's packages and has its own."""
    groups = PROJECT["optional-dependencies"]
    extras = [line for name, group in groups.items() if name != "federated" for line in group]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_conda_takes_a_python_that_the_package_supports():
    (python,) = [item for item in CONDA["dependencies"] if isinstance(item, str) and item.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")


def test_conda_leaves_every_package_to_pip():
    names = {re.split(r"[=<>]", item)[0] for item in CONDA["dependencies"] if isinstance(item, str)}
    assert names == {"python", "pip", "make", "git"}


def test_conda_installs_this_package_pinned_with_extras_that_exist():
    constraint, package = pip_lines()
    assert constraint == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", package)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_make_installs_what_conda_installs():
    _, package = pip_lines()
    assert f"-e '{package.removeprefix('-e ')}'" in (ROOT / ".ci" / "install").read_text("utf-8")


@pytest.mark.parametrize("python", ["/no/such/python3.11", "/bin/true x"])
def test_a_python_that_was_named_is_taken_or_refused(tmp_path, python):
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "install", tmp_path / ".ci")
    named = os.environ | {"PYTHON": python}
    done = subprocess.run(["bash", script], env=named, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(f"PYTHON is {python}, which does not run or is not Python 3.11, 3.12 or 3.13")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("requirement", all_requirements(), ids=lambda r: r.name)
def test_every_direct_dependency_is_pinned_within_its_range(requirement):
    pinned = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_torch_and_torchvision_belong_together():
    assert (PINS["torch"], PINS["torchvision"]) == ("2.14.1", "0.29.1")


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["federated"])
def test_flowers_own_lock_holds_the_package_too(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(FEDERATED_PINS[canonicalize_name(requirement.name)])


def test_both_locks_have_the_same_torch():
    assert [FEDERATED_PINS[name] for name in ("torch", "torchvision")] == ["2.14.1", "0.29.1"]
