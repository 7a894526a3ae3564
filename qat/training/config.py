"""The types of our own config keys. No torch in here: ``--help`` and ``--cfg job`` answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ..policy import QuantPolicy

CONFIG_PATH = "pkg://qat.conf"


@dataclass
class TrainConfig:
    """The keys of conf/train.yaml.

    Args:
        model: an architecture for ``qat.models.build``, or a ``_target_`` of the user's own.
        data, task, optim, trainer: what is instantiated; of data, a module of ours or any LightningDataModule whose
            batches are (inputs, targets).
        policy: a QuantPolicy.
        logger: a ``_target_``, or empty for none.
        adapter: what trains in place of the weights: a ``_target_`` such as ``qat.lora.lora``; empty for none.
        gradient_checkpointing: keep a transformers model's activations at block borders alone, and compute the rest
            again in the backward; a number does so in the first so many blocks, which takes more memory and less time.
        callbacks: by name; a ``_target_`` each, or null to leave one out.
        seed: of everything random.
        name: the run's.
        run_dir: where its config, log and checkpoints go.
        init_from: a checkpoint whose weights the run starts from, or a quantized model in any format, for its codes.
        teacher: a full-precision checkpoint to distil from, or a list of several, whose predictions are averaged.
        resume: a checkpoint to go on from; "auto" for the run's own last one, if there is one.
        compile: run the network through ``torch.compile``.
        compile_mode: of ``torch.compile``; or "blocks", which compiles the repeated block of a language model, and the
            loss, in seconds.
        threads: of the CPU; null leaves it to torch. One is fastest for small models, most of all on a busy machine.
        matmul_precision: of float32 matrix products on a GPU: highest, high (TF32) or medium.
    """

    model: Any = MISSING
    data: Any = MISSING
    policy: QuantPolicy = field(default_factory=QuantPolicy)
    task: Any = MISSING
    optim: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: Any = MISSING
    adapter: Any = None
    gradient_checkpointing: Any = False
    seed: int = 0
    name: str = MISSING
    run_dir: str = MISSING
    init_from: Optional[str] = None  # noqa: UP045  OmegaConf 2.3 reads Optional, not "| None"
    teacher: Any = None
    resume: Optional[str] = None  # noqa: UP045
    compile: bool = False
    compile_mode: str = "default"
    threads: Optional[int] = None  # noqa: UP045
    matmul_precision: str = "highest"


def register() -> None:
    """Tell Hydra the types."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="policy", name="schema", node=QuantPolicy)
