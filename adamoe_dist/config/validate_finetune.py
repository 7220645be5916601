"""Checks of the section ``finetune``, and of what either training command cannot use."""

import dataclasses

from adamoe_dist.config.fields import nearest
from adamoe_dist.config.finetune import FinetuneConfig, LoraConfig
from adamoe_dist.config.load import refuse
from adamoe_dist.config.tree import Config

LORA_TARGETS = ("attention", "experts")


def check_finetune(config: Config, problems: list[str]) -> None:
    """Add what is wrong with the section itself to ``problems``."""
    settings, balance = config.finetune, config.moe.router.balance
    if settings.trainable == []:
        problems.append("finetune.trainable=[] trains nothing; name weights, or use all")
    _check_lora(settings.lora, problems)
    cut = config.parallel.expert_tensor
    if settings.lora.rank is not None and "experts" in settings.lora.targets and cut > 1:
        problems.append(
            f"finetune.lora.targets names experts, which parallel.expert_tensor={cut} cuts; set it to 1, or "
            "finetune.lora.targets=[attention]"
        )
    if settings.anneal_epochs is not None and balance.final_coefficient is None:
        problems.append(
            f"finetune.anneal_epochs={settings.anneal_epochs:g} does nothing without "
            "moe.router.balance.final_coefficient; set both or neither"
        )
    if settings.lora.rank is not None and config.train.recompute == "selective":
        problems.append(
            f"finetune.lora.rank={settings.lora.rank} does not go with train.recompute=selective, which knows no "
            "adapters; use full or none"
        )


def _check_lora(lora: LoraConfig, problems: list[str]) -> None:
    for target in lora.targets:
        if target not in LORA_TARGETS:
            problems.append(f"finetune.lora.targets names {target!r}; {nearest(target, list(LORA_TARGETS))}")
    if not lora.targets:
        problems.append("finetune.lora.targets=[] puts adapters nowhere; name attention, experts or both")
    if lora.rank is None and lora != LoraConfig():
        problems.append(
            f"finetune.lora.alpha={lora.alpha:g}, finetune.lora.targets={lora.targets} do nothing without "
            "finetune.lora.rank; set it or leave them at their defaults"
        )


def check_fine_tuning(config: Config) -> None:
    """Refuse a tree that launch/finetune.py cannot run.

    Raises:
        UserError: naming every key.
    """
    problems: list[str] = []
    start = config.checkpoint
    if start.load_weights is None and start.resume == "none":
        problems.append(
            "checkpoint.load_weights is not set, and fine-tuning starts from a model; give a checkpoint directory or a "
            "run, or continue a run with checkpoint.resume"
        )
    if config.data.prepare.input:
        problems.append(
            f"data.prepare.input={config.data.prepare.input} is for pre-training; name JSONL files in data.train and "
            "set data.prepare.input=[]"
        )
    if config.moe.router.type == "topk":
        problems.append(
            "moe.router.type=topk is Megatron's own router, whose losses do not leave padding out as fine-tuning "
            "needs; set it to adamoe, which with moe.num_null_experts=0 has the same weights and routes as topk does"
        )
    refuse(problems)


def check_pre_training(config: Config) -> None:
    """Refuse a tree that sets what launch/pretrain.py does not read.

    Raises:
        UserError: naming every key of the section ``finetune`` that is not at its default.
    """
    default = FinetuneConfig()
    set_here = [
        f.name for f in dataclasses.fields(default) if getattr(config.finetune, f.name) != getattr(default, f.name)
    ]
    refuse(
        [
            f"finetune.{name} is set, and launch/pretrain.py does not read it; start launch/finetune.py or remove it"
            for name in set_here
        ]
    )
