"""What README says can be typed, can be."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from qat.formats import FORMATS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tmp_path):
    code, with_transformers = (text for language, text in BLOCKS if language == "python")
    compile(with_transformers, "README", "exec")  # what it shows: tests/test_hf.py
    check = "\nassert set(qat.quantized_tensors(model)) == {'0'}\n"
    run = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("line", re.findall(r"^python -m qat\.train (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE))
def test_training_commands_compose(line):
    import qat.train  # noqa: F401  registers the types

    with initialize_config_module("qat.conf", version_base="1.3"):
        if line.startswith("-m "):  # of a sweep, its first job
            line = " ".join(word.partition(",")[0] for word in line.split()[1:])
        assert compose("train", overrides=line.split()).name


def test_every_key_of_the_table_exists():
    table = README.split("| key | what it does |")[1].split("\n\n")[0]
    import qat.train  # noqa: F401

    with initialize_config_module("qat.conf", version_base="1.3"):
        for cell in re.findall(r"^\| `(.*?)`", table, flags=re.MULTILINE):
            compose("train", overrides=cell.split())


def test_the_formats_are_the_formats():
    table = README.split("| `--to` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE)) == sorted(FORMATS)


def test_the_paths_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (root / path).exists(), path


def test_the_layout_names_every_module_once():
    layout = README.split("## Layout")[1].split("```")[1]
    lines = [re.split(r"\s{2,}", line)[0] for line in layout.splitlines() if line.startswith("qat/")]
    named = [name.rstrip("/") for line in lines for name in line.removeprefix("qat/").split()]
    package = Path(__file__).parents[1] / "qat"
    there = [path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(named) == sorted(set(there) - {"__init__.py"})
