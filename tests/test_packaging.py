"""What a stranger's machine relies on: light imports, the lock, the Makefile, the workflows."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import bdpo
from bdpo import publish

# Ground floor first: a room imports only what stands before it. Rooms of one row do not know each other.
FLOORS = [
    ["bdpo"],
    ["bdpo.parameters", "bdpo.losses", "bdpo.logps", "bdpo.results"],
    ["bdpo.imbalance", "bdpo.conventions"],
    ["bdpo.dynamics"],
    ["bdpo.worlds", "bdpo.gaussian"],
    ["bdpo.laws", "bdpo.gaussian"],
    ["bdpo.verify"],
    ["bdpo.ledger", "bdpo.tables"],
    ["bdpo.toy", "bdpo.llm"],
    ["bdpo.figures"],
    ["bdpo.publish"],
    ["bdpo.cli"],
    ["bdpo.__main__"],
]


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("module", ["bdpo", "bdpo.parameters", "bdpo.cli"])
def test_import_is_light(module: str, root: Path) -> None:
    code = f"import sys, {module}; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "bdpo" in loaded
    assert loaded.isdisjoint(
        {"torch", "transformers", "matplotlib", "sympy", "numpy", "hypothesis", "flint", "IPython"}
    )


def test_imports_only_point_down(root: Path) -> None:
    floor = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
    paths = sorted((root / "bdpo").rglob("*.py"))
    assert paths
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        room = ".".join(parts[:2]) if parts[1:] != ("__init__",) else "bdpo"
        package = ".".join(parts[:-1])
        assert room in floor, f"{room} has no place in the house yet: give it one in FLOORS"
        for other in {".".join(m.split(".")[:2]) for m in publish.imported(root, path.read_text(), package)} - {room}:
            assert floor[other] < floor[room], f"{path.name} imports {other}"


# ---------------------------------------------------------------- lock


@pytest.fixture(scope="module")
def lock(root: Path) -> dict[str, Requirement]:
    lines = (root / "requirements.lock").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [canonicalize_name(r.name) for r in found]
    assert len(set(names)) == len(names) > 50
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_lock_pins_every_version_and_names_no_place(root: Path, lock: dict[str, Requirement]) -> None:
    for requirement in lock.values():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), requirement
        assert requirement.url is None
    text = (root / "requirements.lock").read_text()
    for word in ("--", "://", "@", "file:", "sha256", "+"):
        assert word not in text


def test_lock_takes_any_build_of_torch(root: Path) -> None:
    lines = (root / "requirements.lock").read_text().splitlines()
    assert [line for line in lines if re.match(r"torch\b", line)] == ["torch==2.13.0"]


def test_lock_is_what_is_installed(lock: dict[str, Requirement]) -> None:
    for name, requirement in lock.items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(Version(metadata.version(name)).public, prereleases=True), name


def test_lock_meets_what_the_package_asks_for(project: dict[str, Any], lock: dict[str, Requirement]) -> None:
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        asked += extra
    for line in asked:
        wanted = Requirement(line)
        (pin,) = lock[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), line


def test_lock_is_complete(lock: dict[str, Requirement]) -> None:
    """Nothing that a locked package needs here is left to chance."""
    for name, requirement in lock.items():
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.name == "triton":  # its version is fixed by the CUDA builds of torch
                continue
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in lock, f"{name} needs {line}"


def test_versions_agree(root: Path, project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "bdpo.__version__"}
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == bdpo.__version__
    assert valid(root / "CITATION.cff", schema="citation-file-format")


# ---------------------------------------------------------------- make

FAKE = """\
#!/bin/sh
# Stands for python3: notes what it is asked, makes an empty environment, and fails where FAIL says so.
echo "$*" >> {log}
case "$*" in
  *"$(cat {fail})"*) exit 1;;
  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;
esac
"""


class Machine:
    """A Makefile in a folder of its own, with a Python that only pretends."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.venv = folder, folder / ".venv"
        self.log, self.fail, python = folder / "log", folder / "fail", folder / "python3"
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(root / name, folder)
        python.write_text(FAKE.format(log=self.log, fail=self.fail))
        python.chmod(0o755)

    def setup(self, fail: str = "nothing fails") -> tuple[str, str]:
        """What ``make setup`` asked of Python, and what it told people if it failed."""
        self.fail.write_text(fail)
        self.log.write_text("")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(
            ["make", f"PYTHON={self.folder / 'python3'}", "setup"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) is (fail == "nothing fails"), done.stderr
        return self.log.read_text(), done.stderr

    def ready(self) -> int:
        return len(list(self.venv.glob("ready-*")))


@pytest.fixture
def machine(tmp_path: Path, root: Path) -> Machine:
    return Machine(tmp_path, root)


def test_make_installs_only_into_its_own_environment(machine: Machine) -> None:
    asked, _ = machine.setup()
    assert "-m venv --without-pip .venv" in asked
    installs = [line for line in asked.splitlines() if "install" in line]
    assert [line for line in installs if "requirements.lock" in line]
    assert all("--python .venv/bin/python" in line for line in installs)
    assert machine.ready() == 1
    assert machine.setup()[0] == "", "done once"


def test_make_refuses_an_old_python_and_an_old_pip(machine: Machine) -> None:
    assert "bdpo needs Python 3.11 or later" in machine.setup(fail="version_info")[1]
    assert "bdpo needs pip 22.3 or later" in machine.setup(fail="import pip")[1]
    assert not machine.venv.exists()


def test_make_starts_over_from_an_environment_that_was_left_half_made(machine: Machine) -> None:
    machine.setup(fail="requirements.lock")
    assert machine.ready() == 0
    (machine.venv / "half a package").touch()
    machine.setup()
    assert not (machine.venv / "half a package").exists()
    assert machine.ready() == 1


def test_make_updates_when_the_lock_changes_and_deletes_nobodys_environment(machine: Machine) -> None:
    machine.setup()
    (machine.venv / "mine").touch()
    with (machine.folder / "requirements.lock").open("a") as lock:
        lock.write("more==1\n")
    asked, _ = machine.setup()
    assert "-m venv" not in asked
    assert "requirements.lock" in asked
    assert machine.ready() == 1
    assert (machine.venv / "mine").exists()


# ---------------------------------------------------------------- workflows and CI


def workflows(root: Path) -> list[Path]:
    found = sorted((root / ".github" / "workflows").glob("*.yml"))
    assert found
    return found


def valid(*paths: Path, schema: str = "github-workflows") -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, paths)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_workflows_follow_the_schema(root: Path, tmp_path: Path) -> None:
    assert valid(*workflows(root))
    broken = tmp_path / "broken.yml"
    broken.write_text(workflows(root)[0].read_text().replace("runs-on:", "run-on:"))
    assert not valid(broken), "the check can fail"


def test_workflows_pin_their_actions_and_ask_for_little(root: Path) -> None:
    for path in workflows(root):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60
            for step in job["steps"]:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0")), step


def test_ci_runs_what_the_readme_says(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    for command in ("make book", "make test"):
        assert command in lines
        assert command in (root / "README.md").read_text()
