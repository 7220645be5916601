"""What a run's files and packages can answer before anything is built; nothing is written here."""

from adamoe_dist import platform
from adamoe_dist.checkpoint import Start, check_compatible, find_start, notes_on_cut
from adamoe_dist.config import Config, Resolved, schedule_problem
from adamoe_dist.dispatch import check_flex
from adamoe_dist.errors import UserError
from adamoe_dist.monitoring import check_wandb
from adamoe_dist.parallel import choose_implementation
from adamoe_dist.training.corpora import Corpora
from adamoe_dist.training.run_directory import check_run_directory


def check_place(config: Config) -> Start | None:
    """Check the run directory and what is installed, and return the checkpoint to start from, if any.

    Raises:
        UserError: the directory, a package or a checkpoint is not as the run needs it.
    """
    check_run_directory(config)
    platform.compute_precision(config.train.precision)
    choose_implementation(config)
    check_wandb(config)
    if config.moe.dispatcher.type == "flex":
        check_flex(config.moe.dispatcher.flex_backend)
    return find_start(config)


def check_start(config: Config, resolved: Resolved, start: Start | None, corpora: Corpora | None) -> list[str]:
    """Return what changes with the checkpoint that the run starts from.

    Args:
        config: the tree.
        resolved: its arithmetic.
        start: the checkpoint, if there is one.
        corpora: the data; None where it is still to be prepared, and so cannot be compared.

    Raises:
        UserError: the run cannot start from it.
    """
    if start is None:
        if problem := schedule_problem(config):
            raise UserError(problem)
        return []
    tree = config.to_dict()
    known = (None, None) if corpora is None else (corpora.tokenizer.fingerprint, corpora.train.identity())
    notes = check_compatible(start.path, tree, known[0], start.weights_only, known[1])
    return notes if start.weights_only else notes + notes_on_cut(start.path, tree, resolved)
