"""Megatron's groups in one process, for tests that build layers and models."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from adamoe_dist import platform


@pytest.fixture(scope="package", autouse=True)
def one_process() -> Iterator[None]:
    platform.prepare()
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from tests.model.layers import config_of

    with mock.patch.dict(os.environ):
        os.environ.pop("MASTER_PORT", None)
        initialize_groups(Launch(0, 0, 1), config_of({})[1])
        yield
        destroy_groups()
