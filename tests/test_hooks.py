"""The hooks of a commit are those of `make lint`, at the version that the environment has."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
    if repository["repo"] == "local"  # others would need access to the hooks' repositories
}


def test_hooks_run_the_ruff_of_make_lint():
    (ruff,) = re.findall(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    lint = (ROOT / "Makefile").read_text().split("lint: ")[1].split("\n\n")[0]
    commands = re.findall(r"-m (ruff \w+)", lint)
    assert commands == ["ruff check", "ruff format"]
    for command in commands:
        hook = HOOKS[command.replace(" ", "-")]
        assert hook["entry"].startswith(command) and hook["additional_dependencies"] == [ruff]


def test_every_hook_is_pinned_and_from_the_package_index():
    assert len(HOOKS) >= 7 and "nbstripout" in HOOKS
    for hook in HOOKS.values():
        assert hook["language"] == "python"
        assert all("==" in package for package in hook["additional_dependencies"])
    assert "make hooks" in (ROOT / ".ci" / "run").read_text()
