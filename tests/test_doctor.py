"""The environment report, and what it says of the other projects called qat."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from qat import doctor


def install(site: Path, name: str, *files: str) -> None:
    """Lay out a distribution as pip would."""
    info = site / f"{name.replace('-', '_')}-1.8.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.8.1\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()


def problems(site: Path) -> list[str]:
    return doctor.name_problems(metadata.distributions(path=[str(site)]), [str(site)])


def test_report_names_what_is_installed_and_what_will_run(capsys):
    doctor.main([])
    said = capsys.readouterr().out
    for word in ("qat 0.", "Python 3.", "torch", "transformers", "cpu", "int4 weights: "):
        assert word in said


@pytest.mark.parametrize("name", ["qat", "qat-core", "someone-elses"])
def test_another_distribution_that_installs_qat_is_named_with_the_fix(tmp_path, name):
    install(tmp_path, name, "qat/__init__.py", "qat/other.py")
    said = "\n".join(problems(tmp_path))
    assert f"{name} 1.8.1 installs an import package 'qat'" in said and f"pip uninstall {name}" in said
    assert str(tmp_path / "qat") in said  # the shadow itself


def test_our_own_distribution_and_innocent_ones_are_no_problem(tmp_path):
    install(tmp_path, "qat-lsq")
    install(tmp_path, "innocent", "innocent/qat.py")
    assert problems(tmp_path) == []


def test_a_problem_sets_the_exit_status(tmp_path, monkeypatch, capsys):
    install(tmp_path, "qat-core", "qat/__init__.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert doctor.main([]) == 1
    assert "problem: qat-core" in capsys.readouterr().out


def test_missing_package_is_said(monkeypatch, capsys):
    monkeypatch.setitem(doctor.PACKAGES, "no-such-distribution", "nothing")
    doctor.main([])
    assert "no-such-distribution" in capsys.readouterr().out


@pytest.mark.gpu
def test_kernel_runs_on_the_gpu(capsys):
    doctor.main([])
    said = capsys.readouterr().out
    assert "triton, within" in said and "fused Triton kernels on cuda:0, the bits of the reference" in said
