"""The run's configuration for TensorBoard's page HParams, which lists runs with their settings and what came out."""

import time
import typing
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from adamoe_dist.config import Config, leaves, rule_of

Value = bool | float | str
METRICS = {
    "loss/validation": "validation loss",
    "loss/validation_bits_per_byte": "validation bits a byte",
    "loss/lm": "training loss",
    "routing/true_experts_per_token": "true experts a token",
    "routing/expert_flops_saved": "expert FLOPs saved",
    "speed/tokens_per_second": "tokens a second",
}
"""Scalars whose last values stand beside the hyper-parameters."""
FREE_BUT_SHOWN = ("train.steps", "train.micro_batch_size", "train.precision", "train.recompute", "zero.stage")
"""Keys that do not change a run's numbers, or only by rounding, and that runs are told apart by all the same."""


FIRST = (
    "model.hidden_size",
    "moe.num_experts",
    "moe.num_null_experts",
    "moe.top_k",
    "optimizer.learning_rate",
)
"""The columns that are shown until others are ticked."""


def hyperparameter_types() -> dict[str, "api_pb2.DataType"]:
    """Return the keys that the page shows and the type of each.

    They are those that change what is trained, the degrees of parallelism and ``FREE_BUT_SHOWN``; lists are left out.
    The type is that of the declaration, so that all runs agree on it.
    """
    types = {}
    for path, _, kind in leaves(Config):
        rule = rule_of(path)
        is_shown = path.startswith("parallel.") or path in FREE_BUT_SHOWN or (rule is not None and rule.kind != "free")
        if is_shown and (data_type := _data_type(kind)) is not None:
            types[path] = data_type
    return types


def hyperparameters(config: Config) -> dict[str, Value]:
    """Return the values of these keys; one that is null is left out."""
    values: dict[str, Value] = {}
    for path, data_type in hyperparameter_types().items():
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        if value is not None:
            values[path] = str(value) if data_type == api_pb2.DATA_TYPE_STRING else value
    return values


def session_start(config: Config) -> list[Summary]:
    """Return what says which hyper-parameters and metrics there are, and the values of this run."""
    kinds = {path: kind for path, _, kind in leaves(Config)}
    infos = []
    for path, data_type in hyperparameter_types().items():
        info = api_pb2.HParamInfo(name=path, type=data_type, differs=path in FIRST)  # those that differ come first
        if data_type != _NUMBER:
            info.domain_discrete.extend(_choices(kinds[path]))
        infos.append(info)
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in METRICS.items()
    ]
    start = SessionStartInfo(start_time_secs=time.time())
    for path, value in hyperparameters(config).items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[path], field, value)
    return [
        _summary(metadata.EXPERIMENT_TAG, experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)),
        _summary(metadata.SESSION_START_INFO_TAG, session_start_info=start),
    ]


def session_end() -> Summary:
    """Return what says that the run is done."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _summary(tag: str, **content: Any) -> Summary:
    """Return the form of all of the page's data: the description of a series that has no values."""
    described = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def _choices(kind: Any) -> list[bool | str]:
    """Return all values of a declared key, or nothing where there is no end of them: then the page has no filter."""
    if kind is bool:
        return [False, True]
    choices = typing.get_args(kind)
    return list(choices) if all(isinstance(choice, str) for choice in choices) else []


def _data_type(kind: Any) -> Any:
    """Return the type of a declared key, None for lists and mappings."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return _data_type(type(choices[0])) if len({type(choice) for choice in choices}) == 1 else _STRING
    if parts := [part for part in typing.get_args(kind) if part is not type(None)]:
        is_optional = typing.get_origin(kind) is not list and typing.get_origin(kind) is not dict
        found = {_data_type(part) for part in parts} if is_optional else {None}
        return None if None in found else found.pop() if len(found) == 1 else _STRING
    return {bool: api_pb2.DATA_TYPE_BOOL, int: _NUMBER, float: _NUMBER, str: _STRING}.get(kind)


_STRING, _NUMBER = api_pb2.DATA_TYPE_STRING, api_pb2.DATA_TYPE_FLOAT64
