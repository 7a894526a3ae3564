"""Recipes say what they are without the packages that only some of them need, and without touching anything."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONAL = ["gguf", "mlx_lm", "mlxtend", "onnx", "onnxruntime", "openvino", "peft", "pyarrow", "sklearn", "torchao"]
ALL = f"""
import runpy, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if they were not installed

def run(*words):
    sys.argv = [str(word) for word in words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    raise AssertionError(f"{{words}} went on")

recipes = Path(sys.argv[1])
for recipe in sorted(recipes.glob("*.py")):
    assert not run(recipe, "--help"), recipe
print("said: ", run(recipes / "torchao_qat.py", "{{}}", "--json", "x.json"))
"""


def test_help_needs_no_package_and_empties_no_folder(tmp_path):
    kept = tmp_path / "runs" / "demo" / "last.ckpt"
    kept.parent.mkdir(parents=True)
    kept.write_text("an hour's work")
    command, environment = [sys.executable, "-c", ALL, str(ROOT / "recipes")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(list((ROOT / "recipes").glob("*.py")))
    assert "said:  error: this needs torchao" in done.stdout
    assert kept.exists()
