"""One training run from its configuration to its exit code: check, build, restore, train."""

import logging
import traceback

import torch

from adamoe_dist import platform
from adamoe_dist.checkpoint import Start, remove_leftovers
from adamoe_dist.config import Config, Resolved, is_allowed
from adamoe_dist.data import BatchStream
from adamoe_dist.errors import EXIT_BUG, NumericalError, UserError, exit_code_of
from adamoe_dist.model import build_model, choose_trained
from adamoe_dist.parallel import (
    Launch,
    Progress,
    TrainingEngine,
    check_port,
    data_parallel_rank,
    destroy_groups,
    initialize_groups,
    nodes_of_ranks,
    place_of_rank,
    sigterm_as_exit,
    watch_ranks,
)
from adamoe_dist.training.callback import Callback
from adamoe_dist.training.checkpointing import CheckpointWriter, restore
from adamoe_dist.training.checks import check_place, check_start
from adamoe_dist.training.display import ProgressBar
from adamoe_dist.training.heartbeat import Heartbeat
from adamoe_dist.training.logs import OWN, Logs
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.profiling import StepProfiler
from adamoe_dist.training.recorder import Recorder
from adamoe_dist.training.run_directory import (
    checkpoint_root,
    create_run_directory,
    keep_tokenizer,
)
from adamoe_dist.training.sampling import SampleWriter
from adamoe_dist.training.speed import ModelSpeed
from adamoe_dist.training.spikes import SpikeReporter
from adamoe_dist.training.startup import start_report
from adamoe_dist.training.summary import Summary
from adamoe_dist.training.task import Task

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, resolved: Resolved, task: Task, logs: Logs) -> int:
    """Train and return the exit code.

    Rank 0 checks files and prepares missing data while the others wait for it to open the process group, so that a
    refusal comes once and before any group exists.

    Raises:
        UserError: something that the run needs is missing or does not fit.
        NumericalError: the loss or the gradient became NaN or infinite.
    """
    logs.take_over_libraries()
    launch = Launch.from_environment()
    check_port(launch)
    code, progress = 0, Progress()
    try:
        with watch_ranks(launch, progress, config.monitor.hang_timeout_s):
            start = _check_before_groups(config, resolved, task, logs) if launch.rank == 0 else None
            platform.limit_threads()
            expert_nodes = initialize_groups(launch, resolved)
            with sigterm_as_exit():
                start = _from_rank_0(start)
                if launch.rank != 0:
                    logs.open_file(config.run_dir)
                logs.take_over_libraries()
                code = _train_in_groups(config, resolved, launch, task, start, expert_nodes, progress)
    except Exception as error:  # of the only rank: of several, none leaves the watch
        _keep(error)
        raise
    finally:
        destroy_groups()
    return code


def _keep(error: Exception) -> None:
    """Write what ends the run to the log file, a bug with its traceback; the console has it from elsewhere."""
    if isinstance(error, UserError | NumericalError):
        logger.debug("error: %s", error)
    else:
        logger.debug("error: %s", "".join(traceback.format_exception(error)))


def _check_before_groups(config: Config, resolved: Resolved, task: Task, logs: Logs) -> Start | None:
    """Check all that files can answer, prepare what is missing, and return the checkpoint to start from, if any."""
    start = check_place(config)
    task.prepare(config)
    corpora = task.open(config)
    notes = check_start(config, resolved, start, corpora)
    remove_leftovers(checkpoint_root(config))
    create_run_directory(config)
    keep_tokenizer(config, corpora.tokenizer)
    logs.open_file(config.run_dir)
    for note in task.keep(config, corpora) + notes:
        logger.info("%s", note)
    return start


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
    speed = ModelSpeed.of(config, config.padded_vocab_size(corpora.tokenizer.vocab_size), resolved.world_size)
    recorder = Recorder(corpora.validation, speed)
    bar = ProgressBar(recorder.pace)
    writer = CheckpointWriter(config, corpora.tokenizer.fingerprint, dtype)
    callbacks: list[Callback] = []
    profiler = (
        StepProfiler(config.monitor.profile, config.run_dir / "profile") if config.monitor.profile.steps else None
    )
    if profiler is not None:
        callbacks.append(profiler)  # first: nothing that follows a step is in its trace
    if launch.rank == 0:
        callbacks.append(Heartbeat(config.run_dir / "heartbeat.json", progress, config.train.steps))
    if config.monitor.spike_factor is not None:
        callbacks.append(SpikeReporter(config.monitor.spike_window, config.monitor.spike_factor))
    callbacks += [
        bar,
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
    nodes = nodes_of_ranks(launch, device)
    logger.debug("%s", place_of_rank(launch, device), extra=OWN)
    for line in start_report(config, resolved, corpora, built, nodes, speed):
        logger.info("%s", line)
    if trained is not None:
        logger.info("%s", trained)
    restore(trainer, start)
    progress.step, code = trainer.step, EXIT_BUG
    try:
        code = trainer.run()
        return code
    except BaseException as error:
        code = exit_code_of(error)
        raise
    finally:
        progress.end(code)
        logger.debug("rank %d ends after step %d with exit code %d", launch.rank, trainer.step, code, extra=OWN)
        if profiler is not None:
            profiler.close()
        bar.close()
        writer.close()
        recorder.close()
        engine.close()


def _dtype(config: Config) -> torch.dtype:
    return PRECISIONS[platform.compute_precision(config.train.precision)]
