"""What training holds in memory, counted tensor by tensor for transformers' decoder layers.

    weights     float32                                               4 bytes a parameter
    gradients   float32                                               4 bytes a trainable parameter
    AdamW       two float32 moments                                   8 bytes a trainable parameter
    copies      bfloat16 casts of matrices (autocast)                 2 bytes a number of a matrix
    activations what the backward pass needs, for each token of a micro batch
    logits      scores of the vocabulary for each of those tokens, and their gradients

So 16 bytes a parameter in float32 and 18 under bfloat16 autocast, before the first token.

Activations of a token in a layer (h hidden, a heads x head size, n heads, f intermediate, t tokens
a row; after the method of arXiv 2205.05198, section 4, recounted for layers with RMSNorm and gated
MLP; a test counts the tensors that torch really saves, and finds these numbers):

                                                    float32     bfloat16 autocast
    two norms: input and normalised input           4h x 4      4h x 4
    inputs of q, k, v and of gate, up               2h x 4      5h x 2   (cast anew for each)
    q, k, v (k, v repeated for each head), result   4a x 4      4a x 2
    softmax totals, two norms' scales               (n + 2) x 4 (n + 2) x 4
    gate, silu(gate), up, their product             4f x 4      4f x 2
    mask between documents, a row of t              t x 4       t x 2    (not in flash attention)

(One key-value head alone is repeated without a copy.)
With gradient checkpointing (arXiv 1604.06174) only each layer's input stays, h x 4, and one layer
at a time is computed again. Logits take 12 bytes for each word of the vocabulary and token, in
either precision: log-probabilities and two gradients in float32, where the backward pass begins.

Not counted: the framework's own (about 1 GB on a GPU), fragmentation, buffers of communication.
"""

from dataclasses import dataclass
from math import prod

from fedgraft.models import Precision
from fedgraft.study.shape import Shape

GRAFT_BYTES = 100_000_000
"""Peak of extracting and grafting, whatever the size of the model (docs/performance.md)."""

FLOAT32, BFLOAT16 = 4, 2
ADAM_MOMENTS = 2
LOGITS_BYTES = 3 * FLOAT32
GATHERED_LAYERS = 2
"""Layers that FSDP holds whole: the one computed, and the next on its way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that one process holds where training needs the most."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """bfloat16 casts of matrices."""
    gathered: int
    """What FSDP puts together from all processes for the moment."""
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.copies
            + self.gathered
            + self.activations
            + self.logits
        )


def training_memory(
    shape: Shape,
    *,
    micro_batch_rows: int,
    row_length: int,
    precision: Precision,
    gradient_checkpointing: bool = False,
    rank: int | None = None,
    num_processes: int = 1,
) -> Memory:
    """What a process holds; FSDP shards weights, gradients and moments where all are trained.

    With LoRA each of several processes holds the whole model.

    Args:
        micro_batch_rows: Rows of one forward pass of one process.
        rank: Of LoRA; all parameters are trained where None.
    """
    tokens = micro_batch_rows * row_length
    num_shards = num_processes if rank is None else 1
    adapter = 0 if rank is None else shape.adapter_parameters(rank)
    held = shape.num_parameters + adapter
    trained = shape.num_parameters if rank is None else adapter
    layers, matrices = shape.num_hidden_layers, shape.layer_weights
    copied = layers * matrices + shape.output_weights + adapter
    gathered = 0
    if num_shards > 1:
        embeddings = sum(
            prod(size) for name, size in shape.tensors.items() if ".layers." not in name
        )
        whole = embeddings + min(GATHERED_LAYERS, layers) * matrices
        gathered = whole * FLOAT32 * 2  # weights, and gradients likewise
        copied = whole
    layer = layer_activation_bytes(shape, row_length, precision)
    kept = (
        layers * shape.hidden_size * FLOAT32 + layer if gradient_checkpointing else layers * layer
    )
    return Memory(
        weights=_share(held * FLOAT32, num_shards),
        gradients=_share(trained * FLOAT32, num_shards),
        optimizer=_share(trained * FLOAT32 * ADAM_MOMENTS, num_shards),
        copies=copied * BFLOAT16 if precision == "bfloat16" else 0,
        gathered=gathered,
        activations=tokens * (kept + _end_bytes(shape, precision)),
        logits=tokens * shape.vocab_size * LOGITS_BYTES,
    )


def layer_activation_bytes(shape: Shape, row_length: int, precision: Precision) -> int:
    """Bytes that a layer keeps of a token for its backward pass; the table above."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    number, casts = (FLOAT32, 2) if precision == "float32" else (BFLOAT16, 5)
    attention = 4 * shape.attention_size
    if shape.num_key_value_heads == 1:  # repeated without a copy, but where keys are cast
        copies = 2 if precision == "float32" else 1
        attention -= copies * (shape.attention_size - shape.attention_size // heads)
    wide = casts * hidden + attention + 4 * shape.intermediate_size + row_length
    return FLOAT32 * (4 * hidden + heads + 2) + number * wide


def _end_bytes(shape: Shape, precision: Precision) -> int:
    """What is kept of a token outside of the layers: the last norm, sine and cosine, its id."""
    number = FLOAT32 if precision == "float32" else BFLOAT16
    head = shape.attention_size // shape.num_attention_heads
    return FLOAT32 * (2 * shape.hidden_size + 1 + 2 * head) + number * shape.hidden_size + 16


def _share(num_bytes: int, num_shards: int) -> int:
    return -(-num_bytes // num_shards)
