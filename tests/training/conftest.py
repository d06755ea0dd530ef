"""A tiny checkpoint and rows that the tests of training share."""

from pathlib import Path

import pytest
import torch

from fedgraft.testing import TEXT, save_tiny, tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.packing import Rows, pack


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows() -> Rows:
    documents = [Document(id=str(n), text=f"{n}. {TEXT[n % 3]}", source="test") for n in range(40)]
    return pack(tiny_tokenizer(), documents, 64)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other cost more than a tiny model's arithmetic."""
    torch.set_num_threads(1)
