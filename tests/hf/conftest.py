"""Megatron's groups in one process, for tests that compare with the model in training."""

from tests.model.conftest import one_process  # noqa: F401
