"""logger=wandb: when it is online, and what is a run of it."""

import pytest

from qat.training.wandb_logger import is_logged_in

DIGITS = "data=digits model.args.width=4 trainer.accelerator=cpu"


def test_wandb_is_online_only_for_who_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not is_logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert is_logged_in()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert is_logged_in()


def test_each_job_of_a_sweep_is_a_run_of_wandb(train, monkeypatch, tmp_path):
    """Also after one that fails, and none of them ends a run that was open before."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    short = "trainer.max_steps=2 trainer.limit_val_batches=1 trainer.log_every_n_steps=1"
    with pytest.raises(SystemExit):
        train(f"-m {DIGITS} {short} logger=wandb name=a optim.lr=1e30,0.1,0.01")
    jobs = [path for path in (tmp_path / "runs" / "a").iterdir() if path.is_dir()]
    assert [len(list(job.glob("wandb/offline-run-*"))) for job in jobs] == [1, 1, 1]
    for job in jobs:  # which its table tells apart
        (written,) = job.glob("wandb/offline-run-*/run-*.wandb")
        text = written.read_bytes().decode("latin-1")
        assert f"a/{job.name}" in text and '"lr"' in text
    assert wandb.run is None
    with wandb.init(dir=tmp_path) as own:
        train(f"{DIGITS} {short} logger=wandb name=b")
        assert wandb.run is own
