"""The files that a project needs beside its code are well-formed, and agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest

import gossamer

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def steps_of(workflow):
    return [(name, step) for name, job in read(workflow)["jobs"].items() for step in job["steps"]]


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


@named(WORKFLOWS)
def test_a_workflow_has_least_permissions_and_one_run_a_branch(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "github.ref" in workflow["concurrency"]["group"]
    # YAML reads the key `on` as true.
    assert workflow[True]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90
        more = {key: value for key, value in job.get("permissions", {}).items() if value != "read"}
        assert more == ({"id-token": "write"} if name == "publish" else {})


@named(WORKFLOWS)
def test_actions_are_pinned_to_a_major_version(path):
    actions = [step["uses"] for _, step in steps_of(path) if "uses" in step]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action)] == []


def test_pip_is_cached_where_nothing_is_published():
    for path in WORKFLOWS:
        steps = [step for _, step in steps_of(path)]
        publishes = any("publish" in step.get("uses", "") for step in steps)
        setups = [step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python")]
        assert setups
        for setup in setups:
            assert setup.get("cache") == (None if publishes else "pip")
            assert publishes or (ROOT / setup["cache-dependency-path"]).is_file()


@named(WORKFLOWS)
def test_commands_of_a_workflow_are_there(path):
    """The targets of make, and the scripts."""
    commands = [step["run"] for _, step in steps_of(path) if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        assert set(re.findall(r"make ([\w-]+)", command)) <= set(targets)
        assert [name for name in re.findall(r"python3? (\S+\.py)", command) if not (ROOT / name).is_file()] == []


def test_every_target_that_must_pass_is_run():
    commands = {step.get("run") for _, step in steps_of(ROOT / ".github" / "workflows" / "ci.yml")}
    local = re.findall(r"^make \w+$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(local) >= 3
    assert set(local) <= commands


def test_tests_run_on_every_python_and_system():
    matrix = read(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    pairs = {(os, python) for os in matrix["os"] for python in matrix["python"]}
    pairs |= {(extra["os"], extra["python"]) for extra in matrix["include"]}
    assert {python for _, python in pairs} == {"3.11", "3.12", "3.13", "3.14"}
    systems = {re.split(r"-\d+(?:\.\d+)?", os)[0] + ("-arm" if os.endswith("-arm") else "") for os, _ in pairs}
    assert systems == {"ubuntu", "ubuntu-arm", "macos"}
    ci = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    assert {name.removeprefix("cp").removesuffix("-*") for name in ci["build"]} == {
        python.replace(".", "") for _, python in pairs
    }


def test_wheels_are_checked_before_they_are_published():
    jobs = read(".github/workflows/wheels.yml")["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    order = [step.get("run", step.get("uses", "")) for step in jobs["publish"]["steps"]]
    checks = [at for at, step in enumerate(order) if "tools/check_wheel.py dist/*.whl" in step]
    publishes = [at for at, step in enumerate(order) if "pypi-publish" in step]
    assert checks
    assert publishes
    assert checks[0] < publishes[0]


@named(FORMS)
def test_an_issue_form_is_one(path):
    form = read(path)
    assert form["name"]
    assert form["description"]
    assert {field["type"] for field in form["body"]} <= KINDS
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in asked)
    names = [field["id"] for field in asked]
    assert len(set(names)) == len(names)
    assert any(field.get("validations", {}).get("required") for field in asked)
    for field in form["body"]:
        if field["type"] in ("dropdown", "checkboxes"):
            assert len(field["attributes"]["options"]) > 1


def test_there_is_a_form_for_each_occasion():
    assert {path.stem for path in FORMS} == {"bug", "wrong_numbers", "new_method", "new_model"}
    for name in ("bug", "wrong_numbers", "new_model"):
        (doctor,) = [
            field for field in read(f".github/ISSUE_TEMPLATE/{name}.yml")["body"] if field.get("id") == "doctor"
        ]
        assert "gossamer doctor --json" in doctor["attributes"]["label"]
        assert doctor["validations"]["required"]


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= citation.keys()
    assert str(citation["version"]) == gossamer.__version__ == project["version"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]


def test_commits_are_checked_by_the_pinned_ruff():
    (pinned,) = re.findall(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format"}
    assert all(hook["additional_dependencies"] == [f"ruff=={pinned}"] for hook in hooks)


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_no_page_for_contributors_invents_an_address(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text) > 400
    assert re.findall(r"\S+@\S+\.\w+|https?://", text) == []


def test_addresses_of_the_project_are_given_everywhere_or_said_to_be_lacking():
    """A package without any says why; one with some names the repository to who cites it too."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    addresses = {name.lower(): url for name, url in tomllib.loads(text)["project"].get("urls", {}).items()}
    assert addresses.get("repository") == read("CITATION.cff").get("repository-code")
    assert bool(addresses) != ("No [project.urls] yet" in text)
