import pytest
import torch
from tests.evaluation.lessons import Taught, teach


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def taught() -> Taught:
    return teach()
