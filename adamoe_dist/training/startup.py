"""What is said of a run before its first step: one block, each fact once."""

from collections.abc import Sequence
from itertools import groupby

from adamoe_dist import platform
from adamoe_dist.config import Config, Layout, Resolved
from adamoe_dist.model import BuiltModel
from adamoe_dist.parallel import choose_implementation
from adamoe_dist.planning import describe_run
from adamoe_dist.training.corpora import Corpora
from adamoe_dist.training.run_directory import checkpoint_root, environment
from adamoe_dist.training.speed import ModelSpeed

_MOST_SHOWN = 4


def start_report(
    config: Config, resolved: Resolved, corpora: Corpora, built: BuiltModel, nodes: Sequence[int], speed: ModelSpeed
) -> list[str]:
    """Return the report, one fact a line, indented below its first line.

    Args:
        config: the tree.
        resolved: its arithmetic.
        corpora: what the run reads.
        built: the model.
        nodes: the node of each rank.
        speed: against which peak MFU is counted.
    """
    vocabulary = config.padded_vocab_size(corpora.tokenizer.vocab_size)
    precision = platform.compute_precision(config.train.precision)
    around = environment()
    versions = {"python": around["python"], **around["packages"]}
    ranks, *arithmetic = describe_run(config, resolved, vocabulary, precision, not platform.is_cuda())
    facts = [
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"device: {platform.device_name()}, collectives: {platform.communication_backend()}",
        f"kernels: experts {built.experts_kernel} ({built.kernel_reason}), {dispatch_words(config, resolved.layout)}, "
        "{} by {} ({})".format(config.optimizer.type, *choose_implementation(config)),
        ranks,
        places(resolved.layout, nodes),
        *arithmetic,
        speed.describe(),
        data_words(config, corpora),
        checkpoint_words(config),
    ]
    if config.zero.stage == 3:
        facts.append("ZeRO stage 3 is experimental here: compare the first losses with stage 2")
    return [f"run {config.run.name} in {config.run_dir}", *(f"  {fact}" for fact in facts)]


def places(layout: Layout, nodes: Sequence[int]) -> str:
    """Say which ranks are on which node, and which share a layer's experts and so exchange rows."""
    size = layout.expert * layout.expert_tensor
    groups = [range(first, first + size) for first in range(0, layout.world_size, size)]
    by_node = [list(ranks) for _, ranks in groupby(range(len(nodes)), key=nodes.__getitem__)]
    machines = f"{len(by_node)} nodes ({_shown(by_node)})" if len(by_node) > 1 else "one node"
    if size == 1:
        return f"places: {machines}; every rank has all experts of its layers"
    crossing = sum(len({nodes[rank] for rank in group}) > 1 for group in groups)
    where = ", within a node" if not crossing else ", across nodes"
    return f"places: {machines}; ranks {_shown(groups)} share a layer's experts{where if len(by_node) > 1 else ''}"


def _shown(groups: Sequence[Sequence[int]]) -> str:
    words = [f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups[:_MOST_SHOWN]]
    rest = len(groups) - len(words)
    return ", ".join(words) + (f" and {rest} more such groups" if rest else "")


def dispatch_words(config: Config, layout: Layout) -> str:
    """Say how rows reach their experts."""
    dispatcher = config.moe.dispatcher
    if config.moe.router.type == "topk":
        return "router and dispatch Megatron's own"
    if layout.expert * layout.expert_tensor == 1 and not dispatcher.pad_to_capacity:
        return "dispatch local (one expert-parallel rank)"
    if dispatcher.pad_to_capacity:
        return "dispatch padded to capacity"
    if dispatcher.type == "alltoall":
        unit = "rank" if dispatcher.deduplicate else "true expert"
        return f"dispatch alltoall (a row a token and {unit})"
    return f"dispatch {dispatcher.type}"


def data_words(config: Config, corpora: Corpora) -> str:
    """Say what the run reads, and how often."""
    train, sets = config.train, corpora.train.datasets
    drawn, held = train.steps * train.global_batch_size, sum(len(dataset) for dataset in sets)
    words = f"data: {drawn:,} samples in {train.steps} steps"
    if len(sets) == 1:
        words += f", {drawn / held:.3g} passes over {held:,} in {sets[0].prefix}"
    else:
        passes = [
            f"{float(share):.1%} from {dataset.prefix} ({drawn * float(share) / len(dataset):.3g} passes)"
            for share, dataset in zip(corpora.train.shares, sets, strict=True)
        ]
        words += f": {', '.join(passes[:_MOST_SHOWN])}"
        words += f" and {len(passes) - _MOST_SHOWN} more sets" if len(passes) > _MOST_SHOWN else ""
    limit = train.validation_samples
    checked = sum(len(dataset) if limit is None else min(limit, len(dataset)) for dataset in corpora.validation)
    return f"{words}; validation: {f'{checked:,} samples' if checked else 'none'}; tokenizer {config.data.tokenizer}"


def checkpoint_words(config: Config) -> str:
    """Say when the run is saved, and where."""
    settings = config.checkpoint
    when = "after the last step" if settings.interval is None else f"every {settings.interval} steps and after the last"
    kept = "all kept" if settings.keep_last is None else f"the last {settings.keep_last} kept"
    if settings.keep_last is not None and settings.keep_every is not None:
        kept += f", and those of every {settings.keep_every} steps"
    limit = settings.time_limit_minutes
    until = "" if limit is None else f", or after {limit:g} minutes"
    return f"checkpoints: {when}{until}, {kept}, in {checkpoint_root(config)}"
