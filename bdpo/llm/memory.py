r"""What a training step needs, worked out from a model's configuration: memory, communication, time.

Nothing is run; nothing is loaded either, as the parameters are counted on a model without storage. With :math:`N`
parameters, :math:`T` tokens in a forward pass of a device, :math:`L` layers, width :math:`h`, MLP width :math:`f`, and
:math:`d` devices:

======================  ==================================================================================
weights, gradients,     bytes a parameter by `PRECISIONS`, divided by :math:`d` where they are sharded
optimiser
gathered                under FSDP: two layers, embedding and head in the precision that is computed in
activations             :math:`T L\,(13h + 4f)\,b` with :math:`b` bytes a number: what autograd keeps of a Llama layer
                        whose attention keeps no scores. With checkpointing :math:`T L h\,b` and one layer in full
logits                  what `bdpo.logps` holds at a time, and the share of the scored positions' table that it keeps
                        for the backward pass if the head is trained; not :math:`T \times V` numbers
reference               none if precomputed, else one more set of weights
======================  ==================================================================================

A forward and backward pass computes :math:`6 N' T` operations, :math:`N'` without the embedding, plus attention;
checkpointing computes a third more, which the model FLOPs utilisation (MFU) does not count. FSDP sends and receives
:math:`\frac{d-1}{d}` of the weights twice and of the gradients once for each such pass.

Not in the sum: the CUDA context and what an allocator loses to fragments. Leave a tenth of the memory free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bdpo import parameters
from bdpo.logps import CHUNK_SIZE, KEEP

GB = 1e9

#: Bytes a parameter: as trained, gradient, AdamW's two moments, and as computed with.
PRECISIONS = {
    "float32": (4, 4, 8, 4),
    "bf16-mixed": (4, 4, 8, 2),  # float32 weights, products in bfloat16
    "bf16": (2, 2, 4, 2),  # all of it in bfloat16, moments included
}
SHARDING = ("none", "fsdp")

#: Dense bfloat16 operations a second of one device, from its data sheet.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}

#: Bytes a second that one device sends while it receives as many: NVLink of an H100; a network card of 400 Gb/s each.
NVLINK, NETWORK = 450e9, 50e9


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: all, of the input embedding, of the output head (0 if it is the embedding), of a layer."""

    total: int
    embedding: int
    head: int
    layer: int
    layers: int


def count(config: Any) -> Counts:
    """Count the parameters of the causal language model of a configuration, without allocating any.

    Parameters
    ----------
    config
        Of transformers, such as ``LlamaConfig()``, which is that of the first Llama of 6.74 billion parameters.

    Returns
    -------
    Counts
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = config.num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    return Counts(
        sum(weight.numel() for weight in model.parameters()),
        embedding.numel(),
        0 if head is embedding else head.numel(),
        sum(weight.numel() for weight in stack[0].parameters()),
        layers,
    )


@dataclass(frozen=True)
class Estimate:
    """What a step needs on one device, in bytes, and what all devices do together."""

    parameters: int
    trainable: int
    devices: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    reference: float
    avoided: float  #: the table [rows, length, vocabulary] in float32 that is not made
    positions: int  #: positions computed in an optimiser step, over all devices
    communicated: float  #: bytes that a device sends, and receives, in an optimiser step
    flops: float  #: operations of an optimiser step over all devices, without recomputation
    seconds: float  #: of computation at the stated MFU, or of communication, whichever takes longer, as they overlap
    mfu: float

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.optimizer, self.gathered)
        return sum(parts) + self.activations + self.logits + self.reference

    @property
    def tokens_per_second(self) -> float:
        return self.positions / self.seconds

    def fits(self, memory: float) -> bool:
        """Whether a device of that many bytes is enough, with a tenth to spare."""
        return self.total <= 0.9 * memory

    def __str__(self) -> str:
        rows = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "reference", "total")
        lines = [
            f"parameters      {self.parameters:,}"
            + f" ({self.trainable:,} trained)" * (self.trainable < self.parameters)
        ]
        lines += [f"{name:<12}{getattr(self, name) / GB:10.3f} GB a device" for name in rows]
        lines += [
            f"{self.positions:,} positions a step on {self.devices} device(s), {self.flops:.3g} operations, "
            f"{self.communicated / GB:.3g} GB sent a device",
            f"{self.tokens_per_second:,.0f} positions a second at an assumed MFU of {self.mfu:.0%} (on paper, not run)",
        ]
        return "\n".join(lines)


def estimate(
    config: Any,
    *,
    pairs: int = 1,
    prompt_tokens: int = 128,
    response_tokens: int = 128,
    accumulation: int = 1,
    devices: int = 1,
    sharding: str = "none",
    precision: str = "bf16-mixed",
    checkpointing: bool = False,
    share_prompt: bool = True,
    online_reference: bool = False,
    trainable: int | None = None,
    peak_flops: float = PEAK_FLOPS["H100"],
    mfu: float = 0.4,
    bandwidth: float = NVLINK,
) -> Estimate:
    """Estimate a step of `bdpo.llm.trainer.PreferenceTrainer` from a configuration.

    Parameters
    ----------
    config
        Of transformers; the activations are those of a Llama-like decoder.
    pairs
        Pairs in one forward pass of one device.
    prompt_tokens, response_tokens
        Mean lengths in tokens, padding included; response_tokens is that of one response.
    accumulation
        Forward passes a step. More of them cost memory for nothing but time.
    devices
        How many take part; each has its own pairs.
    sharding
        ``"none"`` (a single device, or DDP) or ``"fsdp"`` (weights, gradients and moments are divided).
    precision
        A key of `PRECISIONS`. Frozen weights and a reference are held in the precision that is computed in.
    checkpointing
        Whether activations are computed again in the backward pass.
    share_prompt
        Whether the prompt is computed once for both responses.
    online_reference
        Whether the weights of a reference lie beside the model's, whole on every device, and are run at every step. A
        precomputed reference is run once, on all pairs.
    trainable
        How many parameters are trained, if not all: those of the adapter.
    peak_flops, mfu
        Operations a second of one device at best, and the share of it that is reached: an assumption, between 0 and 1.
    bandwidth
        Bytes a second that a device sends: `NVLINK` within a node, `NETWORK` between nodes.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        For numbers out of range and unknown choices.
    """
    sizes = {"pairs": pairs, "response_tokens": response_tokens, "accumulation": accumulation, "devices": devices}
    for name, value in sizes.items():
        parameters.integer(name, value, 1, 10**9)
    parameters.integer("prompt_tokens", prompt_tokens, 0, 10**9)
    parameters.choice("sharding", sharding, SHARDING)
    parameters.choice("precision", precision, tuple(PRECISIONS))
    parameters.number("mfu", mfu, 0, 1, open_low=True)
    counts = count(config)
    trained = counts.total if trainable is None else parameters.integer("trainable", trainable, 1, 2 * counts.total)
    as_trained, gradient, moments, computed = PRECISIONS[precision]
    frozen = 0 if trainable is None else counts.total
    parts = devices if sharding == "fsdp" else 1
    copy = (
        computed * counts.total if precision == "bf16-mixed" and not frozen else 0
    )  # autocast keeps the casts of a pass
    gathered = computed * (2 * counts.layer + counts.embedding + counts.head) if sharding == "fsdp" else copy

    prompts = prompt_tokens * (1 if share_prompt else 2)
    rows, length = (1, prompts + 2 * response_tokens) if share_prompt else (2, prompt_tokens + response_tokens)
    tokens = pairs * (prompts + 2 * response_tokens)
    width, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or width // heads
    full = tokens * (13 * width + 4 * config.intermediate_size) * computed
    activations = tokens * width * counts.layers * computed + full if checkpointing else full * counts.layers
    scored = 2 * pairs * response_tokens
    logits = 4.0 * min(CHUNK_SIZE, scored * config.vocab_size) + 4 * scored * width
    logits += 4 * KEEP * scored * config.vocab_size * (not frozen)

    passes = 6 if not frozen else 4  # a frozen weight needs no gradient of its own
    passes += 2 * online_reference
    attention = (
        (6 + 2 * online_reference) * counts.layers * heads * head_size * pairs * rows * length**2
    )  # causal: half of the square
    flops = (
        (passes * (counts.total - counts.embedding * (counts.head > 0)) * tokens + attention) * accumulation * devices
    )
    share = (devices - 1) / devices
    communicated = {
        "none": 2 * share * gradient * trained,
        "fsdp": share * (2 * computed * counts.total + computed * trained) * accumulation,
    }[sharding]
    return Estimate(
        parameters=counts.total + (trained if frozen else 0),
        trainable=trained,
        devices=devices,
        weights=(as_trained * trained + computed * frozen) / parts,
        gradients=gradient * trained / parts,
        optimizer=moments * trained / parts,
        gathered=gathered,
        activations=activations,
        logits=logits,
        reference=computed * counts.total if online_reference else 0,
        avoided=4.0 * pairs * 2 * (prompt_tokens + response_tokens) * config.vocab_size,
        positions=tokens * accumulation * devices,
        communicated=communicated,
        flops=flops,
        seconds=max(flops / (devices * peak_flops * mfu), communicated / bandwidth),
        mfu=mfu,
    )


#: The cases of the page on scaling, and what is passed to `estimate`; the adapter is on all linear layers but the head.
CASES: dict[str, dict[str, Any]] = {
    "1 GPU, all weights": {},
    "1 GPU, LoRA of rank 16": {"trainable": 39_976_960},
    "8 GPUs, DDP, all weights": {"devices": 8},
    "8 GPUs, FSDP": {"devices": 8, "sharding": "fsdp"},
    "8 GPUs, FSDP, online reference": {"devices": 8, "sharding": "fsdp", "online_reference": True},
    "4 nodes of 8 GPUs, FSDP": {"devices": 32, "sharding": "fsdp", "bandwidth": NETWORK},
    "the same, 32 pairs a GPU": {"devices": 32, "sharding": "fsdp", "bandwidth": NETWORK, "pairs": 32},
}


def table(config: Any, **lengths: Any) -> str:
    """The cases of the page on scaling as a table in Markdown, with activation checkpointing."""
    lines = [
        "| on paper, not run | a GPU needs | 80 GB | positions/s | sent a step | weights | gradients, moments "
        "| gathered | activations, logits | reference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        e = estimate(config, checkpointing=True, **(lengths | case))
        parts = (e.weights, e.gradients + e.optimizer, e.gathered, e.activations + e.logits, e.reference)
        fits = "yes" if e.fits(80 * GB) else "no"
        speed = f"{e.tokens_per_second:,.0f}" if fits == "yes" else "–"
        cells = [name, f"{e.total / GB:.1f}", fits, speed, *(f"{part / GB:.1f}" for part in (e.communicated, *parts))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
