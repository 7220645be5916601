"""One training run from its configuration to its exit code: check, build, restore, train."""

import logging
import sys
from pathlib import Path

import torch

from adamoe_dist import platform
from adamoe_dist.checkpoint import Start, check_compatible, find_start, notes_on_cut, remove_leftovers
from adamoe_dist.config import Config, Resolved, is_allowed, schedule_problem
from adamoe_dist.data import BatchStream
from adamoe_dist.dispatch import check_flex
from adamoe_dist.errors import UserError, exit_code_of
from adamoe_dist.model import BuiltModel, build_model, choose_trained
from adamoe_dist.monitoring import check_wandb
from adamoe_dist.parallel import (
    Launch,
    Progress,
    TrainingEngine,
    check_port,
    choose_implementation,
    data_parallel_rank,
    destroy_groups,
    initialize_groups,
    sigterm_as_exit,
    watch_ranks,
)
from adamoe_dist.planning import describe_run
from adamoe_dist.training.callback import Callback
from adamoe_dist.training.checkpointing import CheckpointWriter, restore
from adamoe_dist.training.corpora import Corpora
from adamoe_dist.training.heartbeat import Heartbeat
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.recorder import Recorder
from adamoe_dist.training.run_directory import (
    check_run_directory,
    checkpoint_root,
    create_run_directory,
    environment,
    keep_tokenizer,
)
from adamoe_dist.training.sampling import SampleWriter
from adamoe_dist.training.spikes import SpikeReporter
from adamoe_dist.training.summary import Summary
from adamoe_dist.training.task import Task

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, resolved: Resolved, task: Task) -> int:
    """Train and return the exit code.

    Rank 0 checks files and prepares missing data while the others wait for it to open the process group, so that a
    refusal comes once and before any group exists.

    Raises:
        UserError: something that the run needs is missing or does not fit.
        NumericalError: the loss or the gradient became NaN or infinite.
    """
    launch = Launch.from_environment()
    _log_to_console(launch)
    check_port(launch)
    code, progress = 0, Progress()
    try:
        with watch_ranks(launch, progress, config.monitor.hang_timeout_s):
            start = _check_before_groups(config, resolved, task) if launch.rank == 0 else None
            platform.limit_threads()
            expert_nodes = initialize_groups(launch, resolved)
            with sigterm_as_exit():
                code = _train_in_groups(config, resolved, launch, task, _from_rank_0(start), expert_nodes, progress)
    finally:
        destroy_groups()
    return code


def _check_before_groups(config: Config, resolved: Resolved, task: Task) -> Start | None:
    """Check all that files can answer, prepare what is missing, and return the checkpoint to start from, if any."""
    check_run_directory(config)
    platform.compute_precision(config.train.precision)
    choose_implementation(config)
    check_wandb(config)
    if config.moe.dispatcher.type == "flex":
        check_flex(config.moe.dispatcher.flex_backend)
    start = find_start(config)
    notes = task.prepare(config)
    corpora = task.open(config)
    notes += _check_start(config, resolved, start, corpora)
    remove_leftovers(checkpoint_root(config))
    create_run_directory(config)
    keep_tokenizer(config, corpora.tokenizer)
    _log_to_file(config.run_dir / "log.txt")
    for note in notes:
        logger.info("%s", note)
    return start


def _check_start(config: Config, resolved: Resolved, start: Start | None, corpora: Corpora) -> list[str]:
    """Refuse a checkpoint that the run cannot start from; return what changes with it."""
    if start is None:
        if problem := schedule_problem(config):
            raise UserError(problem)
        return []
    tree, identity = config.to_dict(), corpora.train.identity()
    notes = check_compatible(start.path, tree, corpora.tokenizer.fingerprint, start.weights_only, identity)
    return notes if start.weights_only else notes + notes_on_cut(start.path, tree, resolved)


def _from_rank_0(start: Start | None) -> Start | None:
    """Give every rank the checkpoint that rank 0 found: they must start from the same one. Collective."""
    shared = [start]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _train_in_groups(
    config: Config,
    resolved: Resolved,
    launch: Launch,
    task: Task,
    start: Start | None,
    expert_nodes: tuple[int, ...],
    progress: Progress,
) -> int:
    corpora = task.open(config)
    dtype = _dtype(config)
    platform.seed_everything(config.run.seed, config.run.deterministic)
    built = build_model(config, resolved, corpora.tokenizer.vocab_size, dtype, platform.is_cuda(), expert_nodes)
    trained = choose_trained(built.model, config)
    engine = TrainingEngine(built.model, config, resolved, dtype, config.moe.num_experts)
    recorder = Recorder(corpora.validation)
    writer = CheckpointWriter(config, corpora.tokenizer.fingerprint, dtype)
    callbacks: list[Callback] = []
    if launch.rank == 0:
        callbacks.append(Heartbeat(config.run_dir / "heartbeat.json", progress, config.train.steps))
    if config.monitor.spike_factor is not None:
        callbacks.append(SpikeReporter(config.monitor.spike_window, config.monitor.spike_factor))
    callbacks += [
        recorder,
        writer,
        SampleWriter(corpora.tokenizer, recorder),
        Summary(recorder),
    ]
    batches = BatchStream(
        corpora.train,
        config.train.global_batch_size,
        resolved.micro_batch_size,
        data_parallel_rank(),
        resolved.data_parallel,
        may_be_other_samples=is_allowed("data.train", config.checkpoint.allow_changes),
    )
    device = platform.device(launch.local_rank)
    trainer = Trainer(config, resolved, engine, built.model, batches, launch.rank, device, dtype, callbacks, progress)
    _report_start(config, resolved, corpora, built)
    if trained is not None:
        logger.info("%s", trained)
    restore(trainer, start)
    progress.step = trainer.step
    try:
        code = trainer.run()
        progress.end(code)
        return code
    except BaseException as error:
        progress.end(exit_code_of(error))
        raise
    finally:
        writer.close()
        recorder.close()
        engine.close()


def _dtype(config: Config) -> torch.dtype:
    return PRECISIONS[platform.compute_precision(config.train.precision)]


def _report_start(config: Config, resolved: Resolved, corpora: Corpora, built: BuiltModel) -> None:
    packages = environment()["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    logger.info("run %s in %s", config.run.name, config.run_dir)
    logger.info("versions: %s", versions)
    logger.info("device: %s, collectives: %s", platform.device_name(), platform.communication_backend())
    logger.info("experts kernel: %s (%s)", built.experts_kernel, built.kernel_reason)
    if config.zero.stage == 3:
        logger.info("ZeRO stage 3 is experimental here: compare the first losses with stage 2")
    logger.info("optimizer: %s, %s (%s)", config.optimizer.type, *choose_implementation(config))
    vocabulary = config.padded_vocab_size(corpora.tokenizer.vocab_size)
    precision = platform.compute_precision(config.train.precision)
    for line in describe_run(config, resolved, vocabulary, precision, not platform.is_cuda()):
        logger.info("%s", line)


def _log_to_console(launch: Launch) -> None:
    """Rank 0 shows its log; the others, and the libraries, show warnings only. The log file gets more: tracebacks."""
    handler = logging.StreamHandler(sys.stdout if launch.rank == 0 else sys.stderr)
    handler.setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("adamoe_dist")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG)
    for library in ("DeepSpeed", "megatron.core", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _log_to_file(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("adamoe_dist").addHandler(handler)
