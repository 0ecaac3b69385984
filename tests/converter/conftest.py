"""Fixtures that several tests of the converter share."""

import pytest

from gemma4_moe.layout.dtypes import BFLOAT16
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The headers, index and config of the real model over holes."""
    directory = tmp_path_factory.mktemp("real") / "hf"
    write_sparse_checkpoint(directory, real_names_and_shapes(), BFLOAT16, real_config())
    return directory
