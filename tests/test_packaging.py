"""The package as users get it: five ways to run it, what the wheel holds, and what the repository must not hold.

The wheel is built from a copy of the tree without network, and installed into empty environments that borrow this
one's dependencies through a .pth file, so that the whole takes seconds.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("qat", "kernels", "conf")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOL = PROJECT["tool"]["setuptools"]

# Prints where everything came from; raises where something is missing. Torch-free but for the kernels themselves, which
# are imported where users have the wheel, and only found elsewhere.
PROBE = """
import importlib.util, sys
import qat, qat.conf
for name in {kernels}:
    module = importlib.{find}("qat.kernels." + name)
    assert module is not None, name
spec = importlib.util.find_spec("kernels")
places = list(spec.submodule_search_locations) if spec else []
print(qat.__path__[0], sys.modules["qat.kernels"].__path__[0], qat.conf.__path__[0], *places, sep="\\n")
"""


def run(*command: object, cwd: Path | str = "/") -> str:
    """Run a command and return what it printed; a failure shows both streams."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kernel_names() -> list[str]:
    return sorted(file.stem for file in (ROOT / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is packaged: building writes into the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """The wheel that a release would hold: built from the sdist, which is built from the tree."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", out, tree)
    (file,) = out.glob("*.whl")
    return file


def make_environment(folder: Path, *install: object) -> Path:
    """Make an environment with this one's dependencies, but not its `qat`, and install into it; return its python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = [entry for entry in sys.path if entry.endswith("-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))  # their own .pth files, such as an editable qat, stay out
    if install:
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, *install)
    return python


@pytest.fixture(scope="module")
def pythons(tree, wheel, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("environments")
    return {
        "wheel": make_environment(folder / "wheel", wheel),
        "no install": make_environment(folder / "none"),
        "editable": make_environment(folder / "editable", "--editable", tree),
    }


@pytest.mark.parametrize(
    ("installed", "where"),
    [("wheel", "/"), ("wheel", "root"), ("no install", "root"), ("editable", "/"), ("editable", "root")],
)
def test_runs_from(installed, where, pythons, tree):
    """Python puts the working folder first on sys.path: from the root, the checkout wins over the wheel."""
    python, cwd = pythons[installed], tree if where == "root" else Path("/")
    find = "import_module" if (installed, where) == ("wheel", "/") else "util.find_spec"
    probe = PROBE.format(kernels=kernel_names(), find=find)
    qat, kernels, conf, *top_level_kernels = run(python, "-c", probe, cwd=cwd).splitlines()
    from_tree = where == "root" or installed == "editable"
    assert (Path(qat) == tree / "qat") is from_tree
    assert (Path(kernels) == tree / "kernels") is from_tree
    assert (Path(conf) == tree / "conf") is from_tree
    if where == "/":
        assert not any(Path(place).is_relative_to(tree) for place in top_level_kernels)
    job = run(python, "-m", "qat.train", "--cfg", "job", cwd=cwd)  # pkg://qat.conf is found
    assert "trainer:" in job and "policy:" in job


def test_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"qat", wheel.name.split("-py3")[0] + ".dist-info"}
    expected = {"qat/py.typed"}
    for folder, inside in (("qat", "qat"), ("kernels", "qat/kernels"), ("conf", "qat/conf")):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".json"):
                expected.add(f"{inside}/{file.relative_to(ROOT / folder).as_posix()}")
    assert {name for name in names if name.startswith("qat/")} == expected


def test_packages_list_every_folder():
    listed = set(TOOL["packages"])
    found = {"qat.kernels", "qat.conf"}
    for file in (ROOT / "qat").rglob("*.py"):
        found.add(".".join(file.parent.relative_to(ROOT).parts))
    assert listed == found, "packages in pyproject.toml must name every folder of code"


def test_every_package_has_an_init_but_kernels():
    """With one, Hugging Face's `kernels` and our folder would shadow each other from the repository root."""
    for name in TOOL["packages"]:
        folder = ROOT / TOOL["package-dir"].get(name, name.replace(".", "/"))
        assert (folder / "__init__.py").exists() is (name != "qat.kernels"), folder
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_constraints_satisfy_the_ranges_of_pyproject():
    requirements = pytest.importorskip("packaging.requirements")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = requirements.Requirement(line)
        if requirement.name != PROJECT["project"]["name"] and requirement.name.lower() in pins:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def tracked() -> list[Path]:
    """Return what git tracks and a working tree holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_or_an_index():
    folders = [rf"(?<![\w.])/{name}/" for name in ("work", "opt", "root")]
    hosts = [r"pypi\.org", r"files\.pythonhosted", r"download\.pytorch"]
    pattern = re.compile("|".join(folders + hosts))
    found = []
    for file in tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_tracked_files_are_small_and_finished():
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for file in tracked():
        assert file.stat().st_size < 1_000_000, file
        if file.suffix == ".py":
            assert not unfinished.search(file.read_text(encoding="utf-8")), file
