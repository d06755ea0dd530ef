"""A packed row gives what its documents give alone, in every attention that this machine has.

Asked through the very call that training makes: ids, positions and labels of some rows,
`use_cache=False`, no mask. Not run here: flash attention, which needs a GPU and more than positions
to tell documents apart (see `test_packing.py`), and flex attention backwards, in torch for GPUs.
"""

import shutil
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedgraft.testing import ARCHITECTURES, Architecture, tiny_model, tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.packing import pack
from fedgraft.text.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    pytest.param("flex_attention", marks=pytest.mark.slow),  # compiling it takes a minute
    "flash_attention_2",
)
Batch = dict[str, torch.Tensor]


@cache
def rows() -> Rows:
    texts = ["The heron stands.", "A ticket is closed.", "Every morning", "the baker opens"] * 3
    texts = [f"{text}{n}" for n, text in enumerate(texts)]
    texts.append("The river runs past the mill. " * 9)  # longer than a row: its positions go on
    documents = [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]
    return pack(tiny_tokenizer(), documents, 64, num_positions=256)


def batch_of(rows: Rows) -> Batch:
    return {name: torch.from_numpy(array).long() for name, array in rows.stacked().items()}


def model_of(architecture: Architecture, attention: str) -> "PreTrainedModel":
    if attention == "flash_attention_2":
        pytest.skip("flash attention needs a GPU, its own package, and the lengths of documents")
    if attention == "flex_attention" and not shutil.which("g++"):
        pytest.skip("flex attention is compiled, which needs g++")
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    return model


def pieces_of(row: int) -> list[tuple[int, int]]:
    """First and behind the last token of each piece of a row, padding left out."""
    text = rows().texts[0]
    lengths = text.pieces["length"][text.bounds[row] : text.bounds[row + 1]]
    return list(pairwise([0, *np.cumsum(lengths).tolist()]))


def call(model: "PreTrainedModel", **batch: torch.Tensor) -> Any:
    return model(**batch, use_cache=False)


def test_the_rows_hold_what_isolation_is_about() -> None:
    assert len(rows()) > 2
    assert max(len(pieces_of(row)) for row in range(len(rows()))) > 2
    positions = batch_of(rows())["position_ids"]
    assert any(
        positions[row, begin] > 0 for row in range(len(rows())) for begin, _ in pieces_of(row)[:1]
    )
    shared = [row for row in range(len(rows())) if len(pieces_of(row)) > 1]
    assert any(positions[row, begin] > 0 for row in shared for begin, _ in pieces_of(row))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_packed_row_gives_the_logits_of_its_documents_alone(
    architecture: Architecture, attention: str
) -> None:
    model, alone = model_of(architecture, attention), tiny_model(architecture)
    batch = batch_of(rows())
    with torch.no_grad():
        packed = call(model, **batch).logits
        one = call(model, **{name: array[:1] for name, array in batch.items()}).logits
        torch.testing.assert_close(one[0], packed[0], atol=2e-5, rtol=0)
        for row in range(len(rows())):
            for begin, end in pieces_of(row):
                expected = alone(
                    input_ids=batch["input_ids"][row : row + 1, begin:end],
                    position_ids=batch["position_ids"][row : row + 1, begin:end],
                    use_cache=False,
                ).logits[0]
                torch.testing.assert_close(packed[row, begin:end], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("qwen2", "llama")])
def test_other_architectures_keep_documents_apart_too(architecture: Architecture) -> None:
    test_a_packed_row_gives_the_logits_of_its_documents_alone(architecture, "sdpa")


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_no_gradient_crosses_from_a_document_to_another(
    architecture: Architecture, attention: str
) -> None:
    """The loss of one piece moves the embeddings of its own tokens and of no other place."""
    if attention == "flex_attention" and not torch.cuda.is_available():
        pytest.skip("torch has no backward pass of flex attention on a CPU")
    model = model_of(architecture, attention)
    batch = batch_of(rows())
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = call(model, inputs_embeds=embedded, position_ids=batch["position_ids"]).logits
    row = max(range(len(rows())), key=lambda row: len(pieces_of(row)))
    begin, end = pieces_of(row)[1]
    logits[row, begin:end].square().sum().backward()
    assert embedded.grad is not None
    touched = embedded.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[row, begin:end] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_ones_would_let_documents_see_each_other(attention: str) -> None:
    """The accident that the absent mask prevents; if this fails, transformers has changed."""
    model = model_of("qwen2", attention)
    batch = batch_of(rows())
    with torch.no_grad():
        apart = call(model, **batch).logits
        leaking = call(model, **batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (apart - leaking).abs().max() > 1e-3
