"""Imports between the rooms of the code point one way, those inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_NOT_IMPORT = {
    "quantizers": {"layers", "ptq", "formats", "training"},
    "kernels": {"layers", "ptq", "formats", "training"},
    "layers": {"ptq", "formats", "training"},
    "ptq": {"formats", "training"},
    "formats": {"ptq", "training"},
}
COMMANDS = {"train.py", "evaluate.py", "compare.py"}  # they train, or read what a run has left


def rooms_imported(path):
    """Return the names that follow ``qat`` in what a module imports: qat.layers.linear is of layers."""
    package = path.relative_to(ROOT).parent.parts
    if package[0] == "kernels":
        package = ("qat", *package)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        rooms |= {module[1] for module in modules if module[0] == "qat" and len(module) > 1}
    return rooms


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_a_room_imports_none_that_builds_on_it(room):
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "qat" / room
    found = {path.name: rooms_imported(path) & MAY_NOT_IMPORT[room] for path in folder.rglob("*.py")}
    assert found and not any(found.values()), found


def test_only_commands_import_training():
    found = {path.name for path in (ROOT / "qat").glob("*.py") if "training" in rooms_imported(path)}
    assert found == COMMANDS
