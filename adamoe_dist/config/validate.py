"""Checks of the whole tree against itself and the world size, before anything is built."""

from dataclasses import dataclass
from typing import Any

from adamoe_dist.config.continuity import check_allowed_changes
from adamoe_dist.config.layout import Layout, find_layout
from adamoe_dist.config.load import refuse
from adamoe_dist.config.tree import Config
from adamoe_dist.config.validate_finetune import check_finetune
from adamoe_dist.config.validate_monitor import check_profile
from adamoe_dist.config.validate_router import check_router, check_target_load

MICRO_BATCH_TOKENS = 16384

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "nothing: the training loop accumulates",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer.implementation",
    "zero_optimization.reduce_scatter": "nothing: expert gradients need it on",
    "zero_optimization.contiguous_gradients": "nothing: expert gradients need it on",
    "tensorboard": "monitor.tensorboard",
    "csv_monitor": "monitor.csv",
    "wandb": "monitor.wandb",
    "steps_per_print": "monitor.log_interval",
}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What follows from the tree and the world size."""

    layout: Layout
    micro_batch_size: int
    micro_batches_per_rank: int
    tokens_per_step: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of ranks, that train on samples of their own."""
        return self.layout.data

    @property
    def expert_parallel(self) -> int:
        """Number of ranks over which the true experts are spread."""
        return self.layout.expert

    @property
    def expert_data_parallel(self) -> int:
        """Number of ranks that hold the same true experts."""
        return self.layout.expert_data

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one step over all data-parallel ranks."""
        return self.micro_batches_per_rank * self.layout.data


def resolve(config: Config, world_size: int) -> Resolved:
    """Check the tree against itself and ``world_size`` and return the arithmetic.

    Raises:
        UserError: with every problem found, each with its key, its value and the way out.
    """
    problems = model_problems(config)
    _check_data(config, problems)
    _check_training(config, problems)
    _check_monitor(config, problems)
    _check_name(config.run.name, problems)
    _check_deepspeed(config, problems)
    check_finetune(config, problems)
    check_profile(config, world_size, problems)
    layout = find_layout(config, world_size, problems)
    micro_batch_size = _check_batch(config, layout, problems)
    refuse(problems)
    return Resolved(
        layout=layout,
        micro_batch_size=micro_batch_size,
        micro_batches_per_rank=config.train.global_batch_size // (micro_batch_size * layout.data),
        tokens_per_step=config.train.global_batch_size * config.model.sequence_length,
    )


def model_problems(config: Config) -> list[str]:
    """Return what is wrong with the sections ``model`` and ``moe``, whatever run they are for."""
    problems: list[str] = []
    _check_model(config, problems)
    _check_moe(config, problems)
    return problems


def _check_model(config: Config, problems: list[str]) -> None:
    model = config.model
    heads = model.num_attention_heads
    if model.head_dim is not None:
        if model.head_dim % 2:
            problems.append(f"model.head_dim={model.head_dim} is odd; rotary positions need an even head width")
    elif model.hidden_size % heads:
        problems.append(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={model.hidden_size}; "
            "change one of them or set model.head_dim"
        )
    elif (model.hidden_size // heads) % 2:
        problems.append(
            f"model.hidden_size={model.hidden_size} / model.num_attention_heads={heads} is an odd head width; "
            "rotary positions need an even one"
        )
    groups = model.num_query_groups
    if groups is not None and heads % groups:
        problems.append(f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}")
    _check_layers(config, problems)


def _check_layers(config: Config, problems: list[str]) -> None:
    layers, frequency, dense = config.model.num_layers, config.moe.layer_frequency, config.moe.dense_layers
    if frequency > layers:
        problems.append(f"moe.layer_frequency={frequency} leaves no MoE layer in model.num_layers={layers}; lower it")
    elif dense != sorted(set(dense)) or not all(0 <= layer < layers for layer in dense):
        problems.append(
            f"moe.dense_layers={dense} must name layers from 0 to {layers - 1} (model.num_layers={layers}), each once "
            "and in ascending order"
        )
    elif not config.moe_layers:
        problems.append(
            f"moe.dense_layers={dense} leaves no MoE layer in model.num_layers={layers} at moe.layer_frequency="
            f"{frequency}; take some out"
        )


def _check_moe(config: Config, problems: list[str]) -> None:
    moe, balance = config.moe, config.moe.router.balance
    available = moe.num_experts + moe.num_null_experts
    if moe.top_k > available:
        problems.append(
            f"moe.top_k={moe.top_k} is more than the {available} experts there are (moe.num_experts="
            f"{moe.num_experts} + moe.num_null_experts={moe.num_null_experts}); lower it or add experts"
        )
    if moe.shared_expert_gate and moe.shared_expert_hidden_size is None:
        problems.append(
            "moe.shared_expert_gate=true needs a shared expert and moe.shared_expert_hidden_size=null gives none; set "
            "both or neither"
        )
    check_router(config, problems)
    _check_dispatcher(config, problems)
    check_target_load(config, problems)
    if balance.type == "none" and balance.final_coefficient is not None:
        problems.append(
            f"moe.router.balance.final_coefficient={balance.final_coefficient} does nothing with "
            "moe.router.balance.type=none; remove it or choose a balance loss"
        )
    if balance.anneal_steps is not None and balance.final_coefficient is None:
        problems.append(
            f"moe.router.balance.anneal_steps={balance.anneal_steps} does nothing without "
            "moe.router.balance.final_coefficient; set both or neither"
        )
    if balance.anneal != "linear" and balance.final_coefficient is None:
        problems.append(
            f"moe.router.balance.anneal={balance.anneal} does nothing without moe.router.balance.final_coefficient; "
            "set both or neither"
        )


def _check_dispatcher(config: Config, problems: list[str]) -> None:
    dispatcher = config.moe.dispatcher
    kind, padded = dispatcher.type, dispatcher.pad_to_capacity
    if config.moe.router.type == "topk":
        for name, value, default in (("type", kind, "alltoall"), ("dtype", dispatcher.dtype, "model")):
            if value != default:
                problems.append(
                    f"moe.dispatcher.{name}={value} needs moe.router.type=adamoe; the baseline (moe.router.type=topk) "
                    f"has Megatron's own all-to-all: use {default}"
                )
    if kind != "flex" and dispatcher.flex_backend != "deepep":
        problems.append(
            f"moe.dispatcher.flex_backend={dispatcher.flex_backend} does nothing with moe.dispatcher.type={kind}; "
            "remove it or use type=flex"
        )
    if kind == "flex" and config.run.deterministic:
        problems.append(
            "moe.dispatcher.type=flex adds rows in an order that its kernels do not promise; with "
            "run.deterministic=true use type=alltoall or allgather"
        )
    if kind != "alltoall" and not dispatcher.deduplicate:
        problems.append(
            f"moe.dispatcher.deduplicate=false is for type=alltoall; with moe.dispatcher.type={kind} remove it"
        )
    if kind == "allgather" and dispatcher.dtype != "model":
        problems.append(
            f"moe.dispatcher.dtype={dispatcher.dtype} would round the sums that type=allgather makes on the way; use "
            "dtype=model or type=alltoall"
        )
    if padded and config.moe.router.type == "topk":
        problems.append("moe.dispatcher.pad_to_capacity=true needs moe.router.type=adamoe; set it to false")
    if padded and kind != "alltoall":
        problems.append(f"moe.dispatcher.pad_to_capacity=true needs type=alltoall, not {kind}; change one of them")
    cut = config.parallel.expert_tensor
    if cut > 1 and (kind != "alltoall" or padded):
        chosen = "pad_to_capacity=true" if padded else f"type={kind}"
        problems.append(
            f"parallel.expert_tensor={cut} cuts experts, whose rows moe.dispatcher.{chosen} does not gather; set "
            f"parallel.expert_tensor=1 or moe.dispatcher.{'pad_to_capacity=false' if padded else 'type=alltoall'}"
        )
    if padded and config.moe.router.capacity_factor is None:
        problems.append(
            "moe.dispatcher.pad_to_capacity=true needs moe.router.capacity_factor, from which the rows of an expert "
            "follow; set it or set pad_to_capacity=false"
        )


def _check_data(config: Config, problems: list[str]) -> None:
    data = config.data
    if not data.tokenizer:
        problems.append("data.tokenizer is empty; give the tokenizer directory that prepared the data")
    if not data.train:
        problems.append("data.train is empty; give a list of {path: PREFIX, weight: 1.0}")
    for name in ("train", "validation"):
        for number, entry in enumerate(getattr(data, name)):
            problem = _data_entry_problem(entry)
            if problem:
                problems.append(f"data.{name}[{number}]={entry!r} {problem}")
                return
    if data.prepare.input:
        _check_preparation(config, problems)


def _check_preparation(config: Config, problems: list[str]) -> None:
    """What is prepared first must be what the run then opens."""
    data = config.data
    train = [entry["path"] for entry in data.train]
    validation = [entry["path"] for entry in data.validation]
    base = train[0].removesuffix("_train") if len(train) == 1 else ""
    if len(train) != 1 or not train[0].endswith("_train") or validation not in ([], [f"{base}_validation"]):
        problems.append(
            f"data.prepare.input={data.prepare.input} makes one training set PREFIX_train and one validation set "
            f"PREFIX_validation, but data.train is {train} and data.validation is {validation}; name them so, or "
            "set data.prepare.input=[] and prepare them with tools/prepare_data.py"
        )
    elif validation and data.prepare.validation_fraction == 0:
        problems.append(
            f"data.prepare.validation_fraction=0 makes no {validation[0]}, which data.validation names; raise it or "
            "set data.validation=[]"
        )


def _data_entry_problem(entry: dict[str, Any]) -> str | None:
    unknown = set(entry) - {"path", "weight"}
    weight = entry.get("weight", 1.0)
    if unknown:
        return f"has the unknown key {sorted(unknown)[0]}; known: path, weight"
    if not isinstance(entry.get("path"), str) or not entry["path"]:
        return "needs a path: the PREFIX given to tools/prepare_data.py with _train or _validation"
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        return f"has weight {weight!r}; it must be a positive number"
    return None


def _check_training(config: Config, problems: list[str]) -> None:
    is_length_known = config.finetune.epochs is None
    if config.checkpoint.resume == "none" and is_length_known and (problem := schedule_problem(config)):
        problems.append(problem)
    _check_optimizer(config, problems)
    if config.checkpoint.load_weights and config.checkpoint.resume not in ("none", "auto"):
        problems.append(
            f"checkpoint.load_weights={config.checkpoint.load_weights} starts a new run but checkpoint.resume="
            f"{config.checkpoint.resume} continues one; set one of them, or checkpoint.resume=auto to start from the "
            "weights only where there is nothing to continue"
        )
    check_allowed_changes(config, problems)


def schedule_problem(config: Config) -> str | None:
    """Say why a new run cannot have its schedule; one that is continued may go on after its end, at the floor."""
    total, steps = config.total_steps, config.train.steps
    if total >= steps:
        return None
    return f"schedule.total_steps={total} is less than train.steps={steps}; raise it or lower train.steps"


def _check_optimizer(config: Config, problems: list[str]) -> None:
    implementation, is_offloaded = config.optimizer.implementation, config.zero.offload_optimizer
    name = f"optimizer.implementation={implementation}"
    if config.optimizer.type == "sgd" and implementation in ("apex", "deepspeed_cpu"):
        problems.append(f"{name} is for optimizer.type=adamw; with sgd use auto or torch")
    if is_offloaded and config.zero.stage == 0:
        problems.append(
            "zero.offload_optimizer=True needs a sharded optimizer and zero.stage=0 has none; use zero.stage=1 or "
            "more, or set zero.offload_optimizer=false"
        )
    if is_offloaded and implementation == "apex":
        problems.append(f"{name} updates on CUDA and zero.offload_optimizer=True on the CPU; use auto or torch")
    if not is_offloaded and implementation == "deepspeed_cpu":
        problems.append(f"{name} is for an offloaded optimizer; set zero.offload_optimizer=true or use auto")


def _check_name(name: str, problems: list[str]) -> None:
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name:
        problems.append(
            f"run.name={name!r} is to be the name of a directory: not empty, no '/', not '..'; name another place with "
            "run.dir"
        )


def _check_monitor(config: Config, problems: list[str]) -> None:
    monitor, wandb = config.monitor, config.monitor.wandb
    if monitor.sample_interval is not None and monitor.sample_tokens == 0:
        problems.append(
            f"monitor.sample_interval={monitor.sample_interval} does nothing with monitor.sample_tokens=0; set both or "
            "neither"
        )
    if wandb.project == "":
        problems.append("monitor.wandb.project is empty; give a name, or null for none")
    for name in ("group", "team"):
        if wandb.project is None and (value := getattr(wandb, name)) is not None:
            problems.append(
                f"monitor.wandb.{name}={value} does nothing without monitor.wandb.project; set both or neither"
            )


def _check_deepspeed(config: Config, problems: list[str]) -> None:
    extra = config.zero.deepspeed
    paths = set(extra) | {
        f"{name}.{inner}" for name, value in extra.items() if isinstance(value, dict) for inner in value
    }
    for path in sorted(paths & set(OWNED_DEEPSPEED_KEYS)):
        problems.append(f"zero.deepspeed.{path} is set by {OWNED_DEEPSPEED_KEYS[path]}; remove it there")


def _check_batch(config: Config, layout: Layout, problems: list[str]) -> int:
    train, sequence, data_parallel = config.train, config.model.sequence_length // layout.context, layout.data
    share, rest = divmod(train.global_batch_size, data_parallel)
    if rest or not share:
        problems.append(
            f"train.global_batch_size={train.global_batch_size} does not divide over {data_parallel} data-parallel "
            f"ranks; use a multiple of {data_parallel}"
        )
        return 1
    if train.micro_batch_size == "auto":
        return automatic_micro_batch(share, sequence)
    if share % train.micro_batch_size:
        problems.append(
            f"train.micro_batch_size={train.micro_batch_size} x {data_parallel} data-parallel ranks does not divide "
            f"train.global_batch_size={train.global_batch_size}; use a divisor of {share}"
        )
    return train.micro_batch_size


def automatic_micro_batch(share: int, sequence: int) -> int:
    """Return the micro-batch size that ``auto`` means.

    Args:
        share: samples of a data-parallel rank in a step.
        sequence: tokens of a sample on a rank.
    """
    fitting = [size for size in range(1, share + 1) if share % size == 0 and size * sequence <= MICRO_BATCH_TOKENS]
    return max(fitting, default=1)
