"""The training command: its arguments, and what a refusal looks like under a launcher."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config, resolve
from adamoe_dist.console import ToolParser, fail, say
from adamoe_dist.errors import EXIT_NUMERICAL_ERROR, EXIT_USER_ERROR, NumericalError, UserError
from adamoe_dist.launcher import Launch
from adamoe_dist.training.logs import Logs
from adamoe_dist.training.task import FineTuning, PreTraining, Task

DEFAULT_CONFIG = Path("configs/quickstart.yaml")
REFUSAL_HEAD_START_S = 10.0


def pretrain(argv: list[str], default_config: Path = DEFAULT_CONFIG) -> int:
    """Train as the command line says and return the exit code (0, 2, 3, 130 or 143).

    Args:
        argv: arguments after the program's name.
        default_config: configuration used without ``--config``.
    """
    what = "Train an AdaMoE language model. Start it with deepspeed, torchrun, or as one process."
    return _guarded(lambda: _run(argv, PreTraining(), _parser(what, default_config)))


def finetune(argv: list[str], default_config: Path) -> int:
    """Fine-tune a checkpoint's model as the command line says and return the exit code (0, 2, 3, 130 or 143).

    Args:
        argv: arguments after the program's name.
        default_config: configuration used without ``--config``.
    """
    what = "Fine-tune an AdaMoE language model. Start it with deepspeed, torchrun, or as one process."
    return _guarded(lambda: _run(argv, FineTuning(), _parser(what, default_config)))


def _parser(description: str, default_config: Path) -> ToolParser:
    parser = ToolParser(description)
    parser.add_argument("--config", type=Path, default=default_config, metavar="FILE", help="YAML configuration")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run's arithmetic, stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML, stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, metavar="N", help="accepted from launchers, ignored")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to override; values are YAML")
    return parser


def _run(argv: list[str], task: Task, parser: ToolParser) -> int:
    options = parser.parse_intermixed_args(argv)
    config = task.configure(options.config, options.overrides)
    if options.print_config:
        resolve(config, _world_size())
        task.complete(config)
        if _rank() == 0:
            say(config.to_yaml().rstrip())
        return 0
    if options.dry_run:
        return _dry_run(config, task)
    resolved, launch = resolve(config, _world_size()), Launch.from_environment()
    launch.require_address()
    with Logs(launch) as logs:
        from adamoe_dist import platform

        if config.run.deterministic:
            platform.fix_order_of_sums()
        platform.prepare()
        from adamoe_dist.training.session import train

        return train(config, resolved, task, logs)


def _dry_run(config: Config, task: Task) -> int:
    """Check what the run would check before it builds anything, and write nothing."""
    resolved = resolve(config, _world_size())
    if _rank() != 0:
        return 0
    from adamoe_dist import platform

    platform.prepare()
    from adamoe_dist.data import Tokenizer
    from adamoe_dist.planning import describe_run
    from adamoe_dist.training.checks import check_place, check_start

    start = check_place(config)
    corpora = task.look(config)
    notes = check_start(config, resolved, start, corpora)
    if corpora is not None:
        vocabulary = corpora.tokenizer.vocab_size
    elif Path(config.data.tokenizer).exists():
        vocabulary = Tokenizer.load(config.data.tokenizer).vocab_size
    else:
        vocabulary = config.data.prepare.vocab_size
    precision = platform.compute_precision(config.train.precision)
    padded = config.padded_vocab_size(vocabulary)
    for line in describe_run(config, resolved, padded, precision, not platform.is_cuda()):
        say(line)
    for note in notes:
        say(note)
    say("dry run: nothing was trained")
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """Turn the two kinds of refusal into one line on rank 0 and an exit code on every rank."""
    try:
        return action()
    except UserError as refusal:
        return _refuse(refusal, EXIT_USER_ERROR)
    except NumericalError as stop:
        return _refuse(stop, EXIT_NUMERICAL_ERROR)


def _refuse(problem: Any, code: int) -> int:
    if _rank() == 0:
        fail(str(problem))
    else:
        # A launcher ends every rank once one has left; rank 0 must have printed by then.
        time.sleep(REFUSAL_HEAD_START_S)
    sys.stdout.flush()
    return code


def _rank() -> int:
    return Launch.from_environment().rank


def _world_size() -> int:
    return Launch.from_environment().world_size
