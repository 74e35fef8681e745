"""Our losses against the libraries themselves: value and gradient, over shapes, dtypes, masks and extreme inputs.

TRL and Liger are run as installed; torchtune's formula and those of the authors' own code were read and are written
once more below, in our words. ``bdpo.conventions`` says what should agree with what. Where a library differs from us
and we know why, the difference is written down in ``bdpo.conventions.DISAGREEMENTS`` and asserted here to be still
there: when one of these tests fails, the library has changed, and the entry is to be read again.
"""

import importlib.metadata
import inspect
import itertools
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from bdpo import conventions
from bdpo.conventions import CONVENTIONS, DISAGREEMENTS, LIBRARIES, Convention, losses
from bdpo.losses import LOSSES

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL reports to a server when a trainer is made
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO live in trl.experimental, which warns on import

pytestmark = [  # TRL 1.16 uses names of transformers that are to be renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Batch = dict[str, Tensor]

#: Settings to try: the defaults, and ones that no default hides.
SETTINGS: dict[str, list[dict[str, float]]] = {
    "dpo": [{"beta": 0.1}, {"beta": 1.7}],
    "hinge": [{"beta": 0.1}, {"beta": 0.9}],
    "ipo": [{"beta": 0.1}, {"beta": 0.8}],
    "robust_dpo": [{}, {"beta": 0.5, "label_smoothing": 0.3}],
    "conservative_dpo": [{}, {"beta": 0.5, "label_smoothing": 0.3}],
    "dpo_sft": [{}, {"beta": 0.5, "sft_weight": 0.3}],
    "cpo": [{"beta": 0.1}, {"beta": 0.6, "sft_weight": 0.3}],
    "slic": [{}, {"delta": 4.0, "sft_weight": 0.3}],
    "simpo": [{}, {"beta": 10.0, "gamma": 3.0}],
    "orpo": [{}, {"odds_weight": 0.7}],
    "kto": [{}, {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7}],
    "alpha_dpo": [{}, {"beta": 10.0, "gamma": 4.0, "alpha": 2.0}],
    "beta_dpo": [{}, {"beta": 0.5, "alpha": 0.1}],
}


def settings_of(convention: Convention) -> list[dict[str, float]]:
    """The settings to try that the library can express."""
    free = [{k: v for k, v in s.items() if k not in convention.ours} for s in SETTINGS[convention.loss]]
    return [s for k, s in enumerate(free) if s not in free[:k]]


def cases(*libraries: str, last: int | None = None) -> list[Any]:
    """Every convention of some libraries with every setting to try, or with the last only."""
    rows = [(c, s) for c in CONVENTIONS if c.library in libraries for s in settings_of(c)[last:]]
    return [pytest.param(c, s, id=f"{c.library}-{c.where}-{c.loss}-{c.logps}-{k}") for k, (c, s) in enumerate(rows)]


def assert_close(got: Tensor, wanted: Tensor, relative: float, size: float | Tensor = 0.0) -> None:
    """Close relative to the largest of what is compared, or to the size of what it was computed from."""
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    scale = torch.maximum(wanted.double().abs().max(), torch.as_tensor(size, dtype=torch.float64))
    error = (got.double() - wanted.double()).abs().max()
    assert error <= relative * scale, f"off by {error:.3g}, which is {error / scale:.3g} of {scale:.3g}"


def test_the_conventions_were_read_from_the_installed_versions() -> None:
    for library, package in (("trl", "trl"), ("liger", "liger-kernel")):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        read = LIBRARIES[library].version
        assert installed == read, f"read {package} {installed} again, then change its version in bdpo.conventions"


# --- formulas that were read: torchtune, and the authors' own code ----------------------------------------------------


def log_loss(x: Tensor) -> Tensor:
    return softplus(-x)


def original(b: Batch, *, beta: float, ipo: bool, reference_free: bool, label_smoothing: float = 0.0) -> Tensor:
    """``preference_loss`` of the DPO authors, and what torchtune's DPOLoss took from TRL."""
    h = b["policy_chosen_logps"] - b["policy_rejected_logps"]
    if not reference_free:
        h = h - (b["ref_chosen_logps"] - b["ref_rejected_logps"])
    if ipo:
        return (h - 0.5 / beta) ** 2
    return (1 - label_smoothing) * log_loss(beta * h) + label_smoothing * log_loss(-beta * h)


def torchtune_rso(b: Batch, *, gamma: float) -> Tensor:
    h = (b["policy_chosen_logps"] - b["policy_rejected_logps"]) - (b["ref_chosen_logps"] - b["ref_rejected_logps"])
    return (1 - gamma * h).clamp(min=0)


def means(b: Batch) -> Batch:
    """The log-probs a token, which is what code that averages hands to its loss."""
    length = {"chosen": b["chosen_lengths"], "rejected": b["rejected_lengths"]}
    return {k: v / length[k.split("_")[1]] for k, v in b.items() if k.endswith("_logps") and k.split("_")[1] in length}


def simpo_trainer(b: Batch, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    m = means(b)
    return log_loss(beta * (m["policy_chosen_logps"] - m["policy_rejected_logps"] - gamma_beta_ratio))


def alpha_dpo_trainer(b: Batch, *, beta: float, gamma_beta_ratio: float, alpha: float) -> Tensor:
    m = means(b)
    gap = m["policy_chosen_logps"] - m["policy_rejected_logps"]
    margin = gap - (m["ref_chosen_logps"] - m["ref_rejected_logps"])
    shift = gamma_beta_ratio + alpha * (margin - b["margin_mean"]) / b["margin_std"]
    return log_loss(beta * (gap - shift.detach()))


def beta_dpo_loss(b: Batch, *, beta: float, a: float) -> Tensor:
    h = (b["policy_chosen_logps"] - b["policy_rejected_logps"]) - (b["ref_chosen_logps"] - b["ref_rejected_logps"])
    used = (beta * (1 + a * (h.mean() - b["margin_mean"]))).clamp(min=1e-3)
    return log_loss(used.detach() * h)


def orpo_trainer(b: Batch, prompt: bool, *, alpha: float) -> Tensor:
    m = means(b)
    win, lose = m["policy_chosen_logps"], m["policy_rejected_logps"]
    log_odds = (win - lose) - (torch.log1p(-win.exp()) - torch.log1p(-lose.exp()))
    logps = b["policy_chosen_logps"] + (b["prompt_logps"] if prompt else 0)
    tokens = b["chosen_lengths"] + (b["prompt_lengths"] if prompt else 0)
    return -logps.sum() / tokens.sum() - alpha * torch.sigmoid(log_odds).log()


def halos_slic(b: Batch, *, beta: float, lambda_coef: float) -> Tensor:
    """As in the releases whose trainers hand sums to the loss."""
    hinge = (beta - b["policy_chosen_logps"] + b["policy_rejected_logps"]).clamp(min=0)
    return hinge - lambda_coef * b["policy_chosen_logps"]


def halos_kto(b: Batch, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    r = b["policy_logps"] - b["ref_logps"]
    good = desirable_weight * (1 - torch.sigmoid(beta * (r - b["kl"])))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (b["kl"] - r)))
    return torch.where(b["desirable"], good, bad)


def formula(c: Convention) -> Callable[..., Tensor]:
    """The loss of a library that was read, as a function of a batch and of its own settings."""
    plain = {"ipo": False, "reference_free": False}
    table: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("dpo", "preference_loss"): original,
        ("torchtune", "DPOLoss"): lambda b, **s: original(b, **s, **plain),
        ("torchtune", "RSOLoss"): torchtune_rso,
        ("simpo", "SimPOTrainer"): lambda b, loss_type, sft_weight, **s: simpo_trainer(b, **s),
        ("alpha_dpo", "AlphaDPOTrainer"): lambda b, loss_type, ln, **s: alpha_dpo_trainer(b, **s),
        ("beta_dpo", "preference_loss"): lambda b, mode_loss, **s: beta_dpo_loss(b, **s),
        ("orpo", "ORPOTrainer"): lambda b, disable_prompt_loss, **s: orpo_trainer(
            b, prompt=not disable_prompt_loss, **s
        ),
        ("halos", "SLiCTrainer"): halos_slic,
        ("halos", "KTOTrainer"): halos_kto,
    }
    return table[c.library, c.where]


def some_batch(size: int, scale: float, seed: int) -> Batch:
    """Log-probs of up to ``scale`` nats a token, of pairs and of responses, with everything that a loss may need."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (2, size), generator=generator).double()
    token = -scale * torch.rand(4, size, generator=generator, dtype=torch.float64) - 1e-3
    batch = {name: logp * lengths[k % 2] for k, (name, logp) in enumerate(zip(LOSSES["dpo"].needs, token, strict=True))}
    return batch | {
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
        "prompt_logps": -scale * torch.rand(size, generator=generator, dtype=torch.float64) * 9,
        "prompt_lengths": torch.full((size,), 9.0, dtype=torch.float64),
        "policy_logps": batch["policy_chosen_logps"],
        "ref_logps": batch["ref_chosen_logps"],
        "desirable": torch.arange(size) % 3 > 0,
        "kl": torch.tensor(0.7, dtype=torch.float64),
        "margin_mean": torch.tensor(0.2, dtype=torch.float64),
        "margin_std": torch.tensor(0.9, dtype=torch.float64),
    }


def policy_names(batch: Mapping[str, Tensor]) -> list[str]:
    return [name for name in batch if name.startswith(("policy_", "prompt_logps"))]


def differentiate(loss: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean of a loss over a batch, and its gradient in all log-probs of the policy."""
    leaves = {name: batch[name].clone().requires_grad_() for name in policy_names(batch)}
    value = loss({**batch, **leaves}).mean()
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return value.detach(), torch.stack([g.double() for g in gradients])


READ = [key for key, library in LIBRARIES.items() if library.compared == "formula"]


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
@pytest.mark.parametrize(("convention", "settings"), cases(*READ))
def test_formulas_that_were_read_agree(convention: Convention, settings: dict, size: int, scale: float) -> None:
    batch = some_batch(size, scale, seed=size)
    theirs = convention.theirs(**settings)
    value, gradient = differentiate(lambda b: formula(convention)(b, **theirs), batch)
    wanted, slope = differentiate(lambda b: losses(convention, b, **settings), batch)
    if convention.loss == "orpo" and scale > 3:  # sigmoid, then log: their value overflows, ours does not
        assert wanted.isfinite()
        return
    assert_close(value, wanted, 1e-9, size=1e-3)
    assert_close(gradient, slope, 1e-9, size=1e-6)


# --- TRL: the trainers themselves, on a tiny language model -----------------------------------------------------------

ROWS = [
    ("w1 w2 w3 ", "w4 w5", "w6 w7 w8 w9"),
    ("w2 ", "w9 w8 w7 w6 w5 w4 w3", "w1"),
    ("w5 w6 ", "w1 w2 w3", "w1 w2 w3"),  # the same response twice
    ("w7 w7 w7 w7 w7 ", "w2", "w3"),
]


@pytest.fixture(scope="session")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainers, made as a user makes them."""
    pytest.importorskip("trl", reason="TRL is not installed, so its losses were not compared: pip install '.[dev]'")
    import huggingface_hub.constants
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # if somebody loaded the hub's client before us
    disable_progress_bars()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: k for k, word in enumerate([*special.values(), *(f"w{k}" for k in range(20))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    trainers = {
        "DPOTrainer": (DPOTrainer, DPOConfig),
        "CPOTrainer": (CPOTrainer, CPOConfig),
        "ORPOTrainer": (ORPOTrainer, ORPOConfig),
        "KTOTrainer": (KTOTrainer, KTOConfig),
    }
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}

    def model(seed: int, dtype: torch.dtype = torch.float32, sharpness: float = 8.0) -> Any:
        torch.manual_seed(seed)
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **layers, **tokens, tie_word_embeddings=False)).to(dtype)
        with torch.no_grad():
            made.lm_head.weight.mul_(sharpness)  # far from uniform, so that lengths and references matter
        return made

    def trainer(where: str, rows: list[tuple[str, str, str]], policy: Any, reference: Any, **settings: Any) -> Any:
        make, config = trainers[where]
        if where == "KTOTrainer":
            flat = [(p, c, True) for p, c, _ in rows] + [(p, r, False) for p, _, r in rows]
            data = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in flat]
        else:
            data = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
        folder = str(tmp_path_factory.getbasetemp() / "trl")
        needs_reference = {"ref_model": reference} if where in ("DPOTrainer", "KTOTrainer") else {}
        padding = {"remove_unused_columns": False} if where in ("CPOTrainer", "ORPOTrainer") else {}
        return make(
            model=policy,
            args=config(output_dir=folder, per_device_train_batch_size=len(data), **quiet, **padding, **settings),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            **needs_reference,
        )

    return types.SimpleNamespace(model=model, trainer=trainer)


def sums(model: Any, ids: Tensor, attention: Tensor, scored: Tensor) -> Tensor:
    """Log-probs of the scored tokens, summed, in float64: the plain way, and nothing of TRL's."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].double()
    token = log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (token * scored[:, 1:]).sum(-1)


def our_batch(where: str, batch: Any, policy: Any, reference: Any) -> Batch:
    """A batch as TRL's collator made it, as the tensors that our losses take."""
    if where == "KTOTrainer":
        mask, kl_mask = batch["completion_mask"], batch["KL_completion_mask"]
        with torch.no_grad():
            ref = sums(reference, batch["input_ids"], batch["attention_mask"], mask)
            shifted = [sums(m, batch["KL_input_ids"], batch["KL_attention_mask"], kl_mask) for m in (policy, reference)]
        return {
            "policy_logps": sums(policy, batch["input_ids"], batch["attention_mask"], mask),
            "ref_logps": ref,
            "desirable": batch["label"].bool(),
            "kl": (shifted[0] - shifted[1]).mean().clamp(min=0),
        }
    if where == "DPOTrainer":
        halved = [batch[name].chunk(2) for name in ("input_ids", "attention_mask", "completion_mask")]
        split = [dict(zip("ias", tensors, strict=True)) for tensors in zip(*halved, strict=True)]
    else:
        split = [
            {"i": batch[f"{k}_input_ids"], "a": batch[f"{k}_attention_mask"], "s": batch[f"{k}_labels"] != -100}
            for k in ("chosen", "rejected")
        ]
    ours: Batch = {}
    for name, half in zip(("chosen", "rejected"), split, strict=True):
        tensors = half["i"], half["a"], half["s"]
        ours[f"policy_{name}_logps"] = sums(policy, *tensors)
        with torch.no_grad():
            ours[f"ref_{name}_logps"] = sums(reference, *tensors)
        ours[f"{name}_lengths"] = half["s"].sum(-1)
    prompt = split[0]["a"].bool() & ~split[0]["s"].bool()
    ours["prompt_logps"] = sums(policy, split[0]["i"], split[0]["a"], prompt)
    ours["prompt_lengths"] = prompt[:, 1:].sum(-1)
    return ours


def gradient_of(value: Tensor, model: Any) -> Tensor:
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.double().flatten() for g in gradients])


def trl_loss(trl: Any, where: str, rows: list, policy: Any, reference: Any, **settings: Any) -> tuple[Tensor, Any]:
    """What a trainer of TRL computes on its own first batch, and the batch."""
    trainer = trl.trainer(where, rows, policy, reference, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(policy, batch), batch


def compare_with_trl(
    trl: Any, c: Convention, ours: dict, rows: list, dtype: torch.dtype, relative: float, sharpness: float = 8.0
) -> None:
    policy, reference = trl.model(1, dtype, sharpness), trl.model(2, dtype, sharpness)
    loss, batch = trl_loss(trl, c.where, rows, policy, reference, **c.theirs(**ours))
    policy.eval()
    wanted = losses(c, our_batch(c.where, batch, policy, reference), **ours).mean()
    assert_close(loss.detach(), wanted.detach(), relative, size=0.1)
    slope = gradient_of(wanted, policy)
    if c.loss != "hinge":  # which may be done with every pair
        assert slope.abs().max() > 1e-6, "the comparison is not vacuous"
    assert_close(gradient_of(loss, policy), slope, relative, size=1e-2)


@pytest.mark.parametrize(("convention", "settings"), cases("trl"))
def test_trl_agrees_on_a_language_model(trl: Any, convention: Convention, settings: dict) -> None:
    compare_with_trl(trl, convention, settings, ROWS, torch.float32, 5e-5)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:3]], ids=["one", "equal-responses"])
@pytest.mark.parametrize(("convention", "settings"), cases("trl", last=-1))
def test_trl_agrees_on_other_batches(trl: Any, convention: Convention, settings: dict, rows: list) -> None:
    compare_with_trl(trl, convention, settings, rows, torch.float32, 5e-5)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 2e-6), (torch.bfloat16, 0.05)], ids=["double", "bf16"])
@pytest.mark.parametrize(("convention", "settings"), cases("trl", last=-1))
def test_trl_agrees_in_other_dtypes(
    trl: Any, convention: Convention, settings: dict, dtype: torch.dtype, relative: float
) -> None:
    """TRL sums token log-probs in float32 at most, so float64 brings it no closer; bfloat16 models round the logits."""
    compare_with_trl(trl, convention, settings, ROWS, dtype, relative, sharpness=4.0)


@pytest.mark.parametrize(
    ("convention", "settings"), [c for c in cases("trl", last=-1) if c.values[0].where == "DPOTrainer"]
)
def test_trl_agrees_with_padding_on_the_left(trl: Any, convention: Convention, settings: dict) -> None:
    policy, reference = trl.model(1), trl.model(2)
    trainer = trl.trainer("DPOTrainer", ROWS, policy, reference, **convention.theirs(**settings))
    batch = next(iter(trainer.get_train_dataloader()))
    padding = (batch["attention_mask"] == 0).sum(-1)
    assert padding.max() > 0
    left = {k: torch.stack([row.roll(int(n)) for row, n in zip(v, padding, strict=True)]) for k, v in batch.items()}
    policy.eval()
    wanted = losses(convention, our_batch("DPOTrainer", left, policy, reference), **settings).mean()
    loss = trainer.compute_loss(policy, left)
    assert_close(loss.detach(), wanted.detach(), 2e-5, size=0.1)
    assert_close(gradient_of(loss, policy), gradient_of(wanted, policy), 2e-5, size=1e-2)


class Table(torch.nn.Module):
    """A language model whose token log-probs are given: TRL's loss can be asked about any numbers."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.by_width = {table.shape[1]: table for table in tables}

    def forward(self, input_ids: Tensor, **_: Any) -> types.SimpleNamespace:
        logps = self.by_width[input_ids.shape[1] - 1]
        zeros = torch.zeros_like(logps)
        return types.SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


#: Winner and loser under the policy, then under the reference: margins to ±1e4, log-probs to -1e4 and nearly 0.
EXTREMES = torch.tensor(
    [
        *((-2000.0, -2000.0, -2000.0, -2000.0), (-2000.0, -1e-6, -1e-6, -2000.0), (-1e-6, -2000.0, -2000.0, -1e-6)),
        *((-1e4, -1e-6, -1e-6, -1e-6), (-1e-6, -1e4, -1e-6, -1e-6), (-1e-6, -1e-6, -1e4, -1e-6)),
        *((-1e-6, -1e-6, -1e-6, -1e-6), (-1.0, -1.0, -3.0, -2.0), (-30.0, -80.0, -35.0, -60.0)),
        *((-1e-6, -2000.0, -1.0, -2000.0), (-700.0, -690.0, -650.0, -655.0), (-0.5, -5.0, -0.25, -8.0)),
    ],
    dtype=torch.float64,
).T


def pair_of(logps: Tensor, dtype: torch.dtype, lengths: tuple[int, int]) -> tuple[Batch, Tensor]:
    """One pair: as our losses take it, and as a table of token log-probs whose sums these are (up to rounding)."""
    width = max(lengths)
    table = torch.zeros(2, width, dtype=dtype)
    for k, length in enumerate(lengths):
        table[k, :length] = logps[k].to(dtype) / length
    ours = dict(zip(LOSSES["dpo"].needs, logps.to(dtype)[:, None], strict=True))
    ours["policy_chosen_logps"], ours["policy_rejected_logps"] = (table[k : k + 1].sum(-1) for k in (0, 1))
    return ours | {
        f"{k}_lengths": torch.tensor([n]) for k, n in zip(("chosen", "rejected"), lengths, strict=True)
    }, table


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.mark.parametrize(("convention", "settings"), [c for c in cases("trl") if c.values[0].where == "DPOTrainer"])
def test_trl_dpo_agrees_at_the_extremes(trl: Any, convention: Convention, settings: dict) -> None:
    trainer = trl.trainer("DPOTrainer", ROWS[:1], trl.model(0), trl.model(1), **convention.theirs(**settings))
    trainer.precompute_ref_logps = True  # the reference's log-probs come with the batch
    squared = convention.loss == "ipo"
    beta = 1.0 if squared else settings.get("beta", 0.1)
    for logps, lengths, dtype in itertools.product(EXTREMES.T, [(1, 1), (4, 2)], TOLERANCE):
        scored = torch.tensor([[0] + [1] * n + [0] * (max(lengths) - n) for n in lengths])
        mask = dict.fromkeys(("input_ids", "attention_mask"), torch.ones_like(scored)) | {"completion_mask": scored}
        ours, table = pair_of(logps, dtype, lengths)
        table.requires_grad_()
        loss = trainer.compute_loss(Table(table), {**mask, **{k: v for k, v in ours.items() if k.startswith("ref_")}})
        (slope,) = torch.autograd.grad(loss, table)
        leaves = {k: ours[k].clone().requires_grad_() for k in ("policy_chosen_logps", "policy_rejected_logps")}
        wanted = losses(convention, {**ours, **leaves}, **settings).mean()
        wanted_slope = torch.cat(torch.autograd.grad(wanted, list(leaves.values())))
        size = logps.abs().max()  # what is lost where large log-probs cancel, is lost in both
        assert_close(loss.detach(), wanted.detach(), TOLERANCE[dtype], size=(1 + beta * size) ** (1 + squared))
        assert_close(slope[:, 0], wanted_slope, TOLERANCE[dtype], size=size if squared else beta)


def contrast(convention: Convention, win: Tensor, lose: Tensor, settings: dict) -> Tensor:
    """Our loss of log-probs without a reference, each of one token, without the likelihood of the winner."""
    one = torch.ones(len(win))
    batch = {"policy_chosen_logps": win, "policy_rejected_logps": lose, "chosen_lengths": one, "rejected_lengths": one}
    spec = LOSSES[convention.loss]
    without = {k: 0.0 if k == "sft_weight" else v for k, v in {**spec.settings, **settings}.items()}
    values = spec(*(batch[name] for name in spec.needs), **without)
    return convention.scale(**without) * (values + win if convention.loss == "orpo" else values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("convention", "settings"), [c for c in cases("trl") if c.values[0].where in ("CPOTrainer", "ORPOTrainer")]
)
def test_trl_reference_free_losses_agree_at_the_extremes(
    trl: Any, convention: Convention, settings: dict, dtype: torch.dtype
) -> None:
    trainer = trl.trainer(convention.where, ROWS[:1], trl.model(0), None, **convention.theirs(**settings))
    leaves = [x.to(dtype).requires_grad_() for x in EXTREMES[:2]]
    if convention.where == "ORPOTrainer":
        theirs = -trainer.odds_ratio_loss(*leaves)[0]
        relative = 2e-5  # the odds are computed in float32, whatever comes in
    else:
        theirs = trainer.cpo_loss(*leaves)[0]
        relative = TOLERANCE[dtype]
    ours = contrast(convention, *leaves, settings)
    assert_close(theirs.detach(), ours.detach(), relative)
    for got, wanted in zip(
        torch.autograd.grad(theirs.sum(), leaves), torch.autograd.grad(ours.sum(), leaves), strict=True
    ):
        finite = got.isfinite()
        assert finite.sum() >= len(got) - (6 if convention.loss == "orpo" else 0)  # see "trl-orpo-certain"
        assert_close(got[finite], wanted[finite], relative)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kl", [-3.0, 0.0, 40.0])
@pytest.mark.parametrize(("convention", "settings"), [c for c in cases("trl") if c.values[0].where == "KTOTrainer"])
def test_trl_kto_agrees_at_the_extremes(
    trl: Any, convention: Convention, settings: dict, kl: float, dtype: torch.dtype
) -> None:
    trainer = trl.trainer("KTOTrainer", ROWS[:1], trl.model(0), trl.model(1), **convention.theirs(**settings))
    trainer.precompute_ref_logps = True
    policy, ref = EXTREMES[0].to(dtype), EXTREMES[2].to(dtype)
    many = len(policy)
    label = torch.arange(many) % 2 == 0
    table, shifted = policy[:, None].clone().requires_grad_(), torch.full((many, 2), -50.0, dtype=dtype)
    shapes = {"": 2, "KL_": 3}
    masks = {
        f"{k}{n}": torch.ones(many, w, dtype=torch.long)
        for k, w in shapes.items()
        for n in ("input_ids", "attention_mask")
    }
    scored = {f"{k}completion_mask": torch.ones(many, w).long().tril(-1).clamp(max=1) for k, w in shapes.items()}
    batch = {
        **masks,
        **scored,
        "label": label,
        "ref_logps": ref,
        "ref_KL_logps": torch.full((many,), -100 - kl, dtype=dtype),
    }
    loss = trainer.compute_loss(Table(table, shifted), batch)
    (slope,) = torch.autograd.grad(loss, table)
    leaf = policy.clone().requires_grad_()
    ours = {
        "policy_logps": leaf,
        "ref_logps": ref,
        "desirable": label,
        "kl": torch.tensor(kl, dtype=dtype).clamp(min=0),
    }
    wanted = losses(convention, ours, **settings).mean()
    assert_close(loss.detach(), wanted.detach(), TOLERANCE[dtype])
    assert_close(
        slope[:, 0], torch.autograd.grad(wanted, leaf)[0], TOLERANCE[dtype], size=settings.get("beta", 0.1) / many
    )


# --- Liger: its fused losses, on hidden states and an output head -----------------------------------------------------


@pytest.fixture(scope="session")
def liger() -> Any:
    why = "Liger kernels are not installed, so their losses were not compared: pip install '.[dev]'"
    return pytest.importorskip("liger_kernel.chunked_loss", reason=why)


def targets(size: int, length: int, vocabulary: int, masked: str, generator: torch.Generator) -> Tensor:
    """Tokens to predict, -100 where nothing is scored."""
    tokens = torch.randint(vocabulary, (size, length), generator=generator)
    position = torch.arange(length)
    kept = torch.randint(1, length + 1, (size, 1), generator=generator)
    mask = {"none": position < length, "right": position < kept, "left": position >= length - kept}
    mask["holes"] = (position % 3 != 1) | (position == 0)
    return tokens.masked_fill(~mask[masked].expand(size, -1), -100)


def scored_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, wide: torch.dtype) -> Tensor:
    logits = (hidden @ weight.T + (0 if bias is None else bias)).to(wide)
    token = log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    return (token * (target != -100)).sum(-1)


def run_liger(
    liger: Any,
    c: Convention,
    settings: dict,
    masked: str,
    dtype: torch.dtype,
    biased: bool,
    size: int,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Their loss and its gradients, then ours."""
    generator = torch.Generator().manual_seed(size)
    length, width, vocabulary = 5, 8, 33

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, weight = normal(2 * size, length, width).requires_grad_(), normal(vocabulary, width, scale=sharpness)
    bias = normal(vocabulary).requires_grad_() if biased else None
    leaves = [x for x in (hidden, weight.requires_grad_(), bias) if x is not None]
    target = targets(2 * size, length, vocabulary, masked, generator)
    reference = {"ref_input": normal(2 * size, length, width), "ref_weight": normal(vocabulary, width)}
    wide = torch.promote_types(dtype, torch.float32)
    policy = scored_sums(hidden, weight, bias, target, wide)
    with torch.no_grad():
        ref = scored_sums(reference["ref_input"], reference["ref_weight"], None, target, wide)
    module = getattr(liger, c.where)(compiled=False, **c.theirs(**settings))
    if c.loss == "kto":
        label, kl = torch.arange(2 * size) % 3 > 0, torch.tensor(0.7)
        loss = module(hidden, weight, target, bias, preference_labels=label, kl=kl, **reference)[0]
        batch = {"policy_logps": policy, "ref_logps": ref, "desirable": label, "kl": kl}
    else:
        used = reference if c.theirs().get("use_ref_model") else {}
        loss = module(weight, hidden, target, bias, **used)[0]
        lengths = (target != -100).sum(-1)
        names = (
            [f"policy_{k}_logps" for k in ("chosen", "rejected")],
            [f"ref_{k}_logps" for k in ("chosen", "rejected")],
        )
        batch = dict(zip(names[0], policy.chunk(2), strict=True)) | dict(zip(names[1], ref.chunk(2), strict=True))
        batch |= dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    wanted = losses(c, batch, **settings).mean()
    slopes = [torch.cat([g.double().flatten() for g in torch.autograd.grad(x, leaves)]) for x in (loss, wanted)]
    return loss.detach(), slopes[0], wanted.detach(), slopes[1]


@pytest.mark.parametrize("masked", ["none", "right", "left", "holes"])
@pytest.mark.parametrize(("size", "biased"), [(1, False), (3, True)])
@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float32, 2e-5), (torch.float64, 2e-5), (torch.bfloat16, 0.05)],
    ids=["float32", "float64", "bfloat16"],
)
@pytest.mark.parametrize(("convention", "settings"), cases("liger"))
def test_liger_agrees(
    liger: Any,
    convention: Convention,
    settings: dict,
    masked: str,
    size: int,
    biased: bool,
    dtype: torch.dtype,
    relative: float,
) -> None:
    loss, slope, wanted, wanted_slope = run_liger(liger, convention, settings, masked, dtype, biased, size, 1.0)
    assert_close(loss, wanted, relative, size=0.1)
    assert_close(slope, wanted_slope, relative, size=1e-2)


@pytest.mark.parametrize(("convention", "settings"), [c for c in cases("liger") if c.values[0].loss != "orpo"])
def test_liger_agrees_at_the_extremes(liger: Any, convention: Convention, settings: dict) -> None:
    """Log-probs of thousands of nats. ORPO's part is the entry "liger-orpo-certain"."""
    for sharpness in (1e-3, 300.0):
        loss, slope, wanted, wanted_slope = run_liger(
            *(liger, convention, settings, "right", torch.float32, False, 4, sharpness)
        )
        assert_close(loss, wanted, 5e-5, size=0.1)
        assert_close(slope, wanted_slope, 5e-5, size=1e-2)


# --- where they differ: each known disagreement is still there --------------------------------------------------------

DRIFT: set[str] = set()


def still(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark the test that a known disagreement is still there."""
    DRIFT.add(key)
    return lambda test: test


def test_every_disagreement_is_asserted_to_be_still_there() -> None:
    assert set(DISAGREEMENTS) == DRIFT
    for entry in DISAGREEMENTS.values():
        assert entry.library in LIBRARIES
        assert set(entry.losses) <= set(LOSSES)
        assert all((entry.what, entry.cause, entry.so))


def dpo_loss_of_trl(trl: Any, **settings: Any) -> tuple[float, Batch]:
    policy, reference = trl.model(1), trl.model(2)
    loss, batch = trl_loss(trl, "DPOTrainer", ROWS, policy, reference, **settings)
    return loss.item(), our_batch("DPOTrainer", batch, policy, reference)


def pairs(batch: Batch, loss: str) -> list[Tensor]:
    return [batch[name] for name in LOSSES[loss].needs]


def test_the_chapter_counts_the_loss_types_of_trl(root: Path) -> None:
    source = inspect.getsource(pytest.importorskip("trl.trainer.dpo_trainer"))
    types = set(re.findall(r'loss_type == "(\w+)"', source))
    said = (root / "notebooks/conventions.md").read_text()
    assert len(types) == 15
    assert "Of TRL's fifteen loss types in `DPOTrainer`" in said
    ours = {name for c in CONVENTIONS if c.where == "DPOTrainer" for name in c.fixed["loss_type"]}
    assert ours < types
    assert {"exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero"} <= types - ours


@still("trl-ipo-means")
def test_trl_ipo_is_not_the_equation_on_sums(trl: Any) -> None:
    loss, batch = dpo_loss_of_trl(trl, loss_type=["ipo"], beta=0.1)
    assert abs(loss - LOSSES["ipo"](*pairs(batch, "ipo"), beta=0.1).mean().item()) > 0.03 * loss
    assert loss == pytest.approx(losses(conventions.find("DPOTrainer", "ipo"), batch, beta=0.1).mean().item(), rel=1e-5)


@still("trl-smoothing-ignored")
def test_trl_sigmoid_ignores_label_smoothing(trl: Any) -> None:
    plain, batch = dpo_loss_of_trl(trl, loss_type=["sigmoid"], beta=0.5)
    smoothed, _ = dpo_loss_of_trl(trl, loss_type=["sigmoid"], beta=0.5, label_smoothing=0.3)
    assert smoothed == plain
    wanted = LOSSES["conservative_dpo"](*pairs(batch, "dpo"), beta=0.5, label_smoothing=0.3).mean().item()
    assert abs(plain - wanted) > 1e-3


@still("label-smoothing-twice")
def test_one_name_for_opposite_corrections() -> None:
    batch = some_batch(5, 1.0, 0)
    torchtune = formula(conventions.find("DPOLoss", "conservative_dpo"))(batch, beta=0.1, label_smoothing=0.2)
    plain, robust = (
        LOSSES[k](*pairs(batch, "dpo"), beta=0.1, **s)
        for k, s in (("dpo", {}), ("robust_dpo", {"label_smoothing": 0.2}))
    )
    assert ((torchtune - plain) * (robust - plain) < 0).all()
    smoothing = conventions.smoothing_of_noise(0.2)  # outside the range of conservative_dpo, inside that of its formula
    torch.testing.assert_close(
        original(batch, beta=0.1, ipo=False, reference_free=False, label_smoothing=smoothing), robust
    )


def cpo_loss_of_trl(trl: Any, rows: list, **settings: Any) -> float:
    return trl_loss(trl, "CPOTrainer", rows, trl.model(1), None, **settings)[0].item()


@still("trl-simpo-likelihood")
def test_trl_simpo_adds_the_likelihood_by_default(trl: Any) -> None:
    simpo = cpo_loss_of_trl(trl, ROWS, loss_type="simpo", cpo_alpha=0.0)
    default = cpo_loss_of_trl(trl, ROWS, loss_type="simpo")
    assert default - simpo == pytest.approx(
        cpo_loss_of_trl(trl, ROWS, cpo_alpha=1.0) - cpo_loss_of_trl(trl, ROWS, cpo_alpha=0.0), rel=1e-5
    )
    assert default - simpo > 0.1


@still("trl-likelihood-batch")
def test_trl_likelihood_of_two_micro_batches_is_not_that_of_one(trl: Any) -> None:
    def term(rows: list) -> float:
        return cpo_loss_of_trl(trl, rows, cpo_alpha=1.0) - cpo_loss_of_trl(trl, rows, cpo_alpha=0.0)

    assert abs(term(ROWS[:2]) - (term(ROWS[:1]) + term(ROWS[1:2])) / 2) > 1e-3
    assert (
        abs(cpo_loss_of_trl(trl, ROWS[:2]) - (cpo_loss_of_trl(trl, ROWS[:1]) + cpo_loss_of_trl(trl, ROWS[1:2])) / 2)
        > 1e-3
    )


@still("trl-orpo-prompt")
def test_trl_orpo_counts_the_prompt(trl: Any) -> None:
    policy = trl.model(1)
    loss, batch = trl_loss(trl, "ORPOTrainer", ROWS, policy, None)
    ours = our_batch("ORPOTrainer", batch, policy, policy)
    convention = conventions.find("ORPOTrainer", "orpo", "trl")
    assert loss.item() == pytest.approx(losses(convention, ours).mean().item(), rel=1e-5)
    without = losses(conventions.find("LigerFusedLinearORPOLoss", "orpo"), ours).mean()
    assert abs(loss.item() - without.item()) > 1e-2


@still("trl-orpo-certain")
def test_trl_orpo_gives_nan_for_a_certain_response(trl: Any) -> None:
    trainer = trl.trainer("ORPOTrainer", ROWS[:1], trl.model(0), None)
    for dtype in (torch.float32, torch.float64):
        leaves = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (-1e-9, -1.0)]
        theirs = -trainer.odds_ratio_loss(*leaves)[0]
        ours = contrast(conventions.find("ORPOTrainer", "orpo", "trl"), *leaves, {"odds_weight": 0.1})
        torch.testing.assert_close(theirs.double(), ours.double(), rtol=1e-5, atol=0)
        assert torch.autograd.grad(theirs.sum(), leaves)[0].isnan().all()
        assert torch.autograd.grad(ours.sum(), leaves)[0].isfinite().all()


@still("trl-empty-response")
def test_trl_and_responses_without_tokens(trl: Any) -> None:
    policy = trl.model(0)
    trainer = trl.trainer("DPOTrainer", ROWS, policy, trl.model(1), loss_type=["ipo"])
    batch = next(iter(trainer.get_train_dataloader()))
    batch["completion_mask"][0] = 0
    assert trainer.compute_loss(policy, batch).isfinite()
    trainer = trl.trainer("CPOTrainer", ROWS, policy, None, loss_type="simpo")
    batch = next(iter(trainer.get_train_dataloader()))
    batch["chosen_labels"][0] = -100
    assert trainer.compute_loss(policy, batch).isnan()
    one = -torch.ones(1)
    with pytest.raises(ValueError, match="drop empty"):
        LOSSES["simpo"](one, one, torch.zeros(1), -one)


@still("trl-kto-cancels")
def test_trl_kto_rounds_small_losses_to_nothing(trl: Any) -> None:
    model = trl.model(0)
    trainer = trl.trainer("KTOTrainer", ROWS[:1], model, trl.model(1), beta=1.0)
    trainer.precompute_ref_logps, trainer.calculate_KL = True, False
    table = torch.full((2, 1), -1.0, requires_grad=True)
    ids = torch.ones(2, 2, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": ids.tril(),
        "label": torch.tensor([True, True]),
    }
    loss = trainer.compute_loss(Table(table), batch | {"ref_logps": torch.full((2,), -21.0)})
    ours = LOSSES["kto"](table[:, 0], torch.full((2,), -21.0), batch["label"], torch.zeros(()), beta=1.0).mean()
    assert loss.item() == 0
    assert torch.autograd.grad(loss, table)[0].abs().max() == 0
    assert ours.item() == pytest.approx(math.exp(-20), rel=1e-5)
    assert torch.autograd.grad(ours, table)[0].abs().min() > 0


@still("liger-ipo-missing")
def test_liger_has_no_ipo(liger: Any) -> None:
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        liger.LigerFusedLinearDPOLoss(loss_type="ipo")


def of_liger(liger: Any, where: str, hidden: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """One of Liger's losses on a fixed batch, and the gradient in the hidden states."""
    generator = torch.Generator().manual_seed(0)
    weight, drawn = torch.randn(33, 8, generator=generator), torch.randn(4, 5, 8, generator=generator)
    hidden = (drawn if hidden is None else hidden).clone().requires_grad_()
    target = torch.randint(33, hidden.shape[:2], generator=generator)
    if where == "LigerFusedLinearKTOLoss":
        label, reference = torch.arange(4) % 2 == 0, {"ref_input": drawn.flip(0), "ref_weight": weight.flip(0)}
        kl = settings.pop("kl", None)
        module = getattr(liger, where)(compiled=False, **settings)
        loss = module(hidden, weight, target, preference_labels=label, kl=kl, **reference)[0]
    else:
        module = getattr(liger, where)(compiled=False, **settings)
        loss = module(weight, hidden, target)[0]
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@still("liger-smoothing-ignored")
def test_liger_sigmoid_ignores_label_smoothing(liger: Any) -> None:
    plain = of_liger(liger, "LigerFusedLinearDPOLoss", use_ref_model=False)[0]
    assert of_liger(liger, "LigerFusedLinearDPOLoss", use_ref_model=False, label_smoothing=0.3)[0] == plain
    smoothed = of_liger(liger, "LigerFusedLinearCPOLoss", label_smoothing=0.3)[0]
    assert of_liger(liger, "LigerFusedLinearCPOLoss")[0] != smoothed


@still("liger-simpo-likelihood")
def test_liger_simpo_adds_the_likelihood_by_default(liger: Any) -> None:
    default = of_liger(liger, "LigerFusedLinearSimPOLoss")[0]
    assert default - of_liger(liger, "LigerFusedLinearSimPOLoss", compute_nll_loss=False)[0] > 1
    function = liger.simpo_loss.LigerFusedLinearSimPOFunction.forward
    assert inspect.signature(function).parameters["compute_nll_loss"].default is False


@still("liger-average-default")
def test_liger_averages_in_the_base_class_and_sums_in_dpo(liger: Any) -> None:
    base = liger.fused_linear_preference.LigerFusedLinearPreferenceBase
    assert inspect.signature(base.forward).parameters["average_log_prob"].default is True
    for where in ("LigerFusedLinearDPOLoss", "LigerFusedLinearCPOLoss", "LigerFusedLinearKTOLoss"):
        assert getattr(liger, where)().average_log_prob is False


@still("liger-orpo-certain")
def test_liger_orpo_gives_nan_for_a_certain_response(liger: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(33, 8, generator=generator), 100 * torch.randn(2, 1, 8, generator=generator)
    hidden.requires_grad_()
    likeliest = (hidden @ weight.T).argmax(-1)
    target = torch.stack([likeliest[0], (likeliest[1] + 1) % 33])
    loss = liger.LigerFusedLinearORPOLoss(compiled=False)(weight, hidden, target)[0]
    assert torch.autograd.grad(loss, hidden)[0].isnan().any()
    leaf = torch.tensor([-1e-9], requires_grad=True)
    one = torch.ones(1)
    ours = LOSSES["orpo"](leaf, -one, one, one)
    assert torch.autograd.grad(ours.sum(), leaf)[0].isfinite().all()


@still("liger-kto-reference")
def test_liger_kto_drops_the_reference_by_default(liger: Any) -> None:
    default, without, with_it = (
        of_liger(liger, "LigerFusedLinearKTOLoss", **settings)[0]
        for settings in ({}, {"use_ref_model": False}, {"use_ref_model": True})
    )
    assert default == without != with_it
    function = liger.kto_loss.LigerFusedLinearKTOFunction.forward
    assert inspect.signature(function).parameters["use_ref_model"].default is True


@still("liger-kto-negative")
def test_liger_kto_takes_a_negative_reference_point(liger: Any) -> None:
    zero, negative = (of_liger(liger, "LigerFusedLinearKTOLoss", kl=torch.tensor(kl))[0] for kl in (0.0, -5.0))
    assert zero != negative
    one = -torch.ones(1)
    with pytest.raises(ValueError, match=r"kl contains -5\.0"):
        LOSSES["kto"](one, one, torch.tensor([True]), torch.tensor(-5.0))


@still("liger-float32")
def test_liger_computes_in_float32(liger: Any) -> None:
    convention = conventions.find("LigerFusedLinearDPOLoss", "dpo")
    loss, slope, wanted, wanted_slope = run_liger(liger, convention, {}, "none", torch.float64, False, 3, 1.0)
    assert (loss.dtype, wanted.dtype) == (torch.float32, torch.float64)
    assert (slope - wanted_slope).abs().max() > 1e-10


@still("alpha-dpo-first-steps")
@still("beta-dpo-first-steps")
def test_running_statistics_that_start_at_zero() -> None:
    """The authors' averages, 0.9 of the old and 0.1 of the batch, after their first batch; then after many."""
    margins = torch.tensor([2.0, 3.0, 5.0, 6.0], dtype=torch.float64)

    def standardised(batches: int) -> Tensor:
        mean = std = 0.0
        for _ in range(batches):
            mean, std = 0.9 * mean + 0.1 * margins.mean(), 0.9 * std + 0.1 * margins.std()
        return (margins - mean) / std

    settled = (margins - margins.mean()) / margins.std()
    torch.testing.assert_close(standardised(200), settled, atol=1e-6, rtol=1e-6)
    first = standardised(1)
    torch.testing.assert_close(first.std(), 10 * settled.std())
    assert first.mean() > 10  # where the settled mean is 0
    beta_first, beta_settled = 0.1 * (1 + 0.6 * (margins.mean() - 0.1 * margins.mean())), 0.1
    assert beta_first > 3 * beta_settled


@still("halos-slic-shapes")
def test_hinges_of_pairs_and_likelihoods_of_tokens_do_not_add_up() -> None:
    tokens = -torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    hinge = (1 - tokens.sum(-1) + tokens.flip(0).sum(-1)).clamp(min=0)
    with pytest.raises(RuntimeError, match="must match the size"):
        _ = hinge + 0.1 * -tokens
