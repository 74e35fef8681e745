"""Pairs, the pass that shares the prompt, the objective, the trainer on one process, and the estimate of memory."""

import copy
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bdpo import losses
from bdpo.llm import memory
from bdpo.llm.objective import METRICS, Objective
from bdpo.llm.pairs import ATTENTION, SHARING, PairCollator, Pairs, add_pair_scoring, check_model, score, tokenize
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer, TrainingDiverged, _check_distribution

# PEFT asks transformers for a property under its older name; everything that has no adapter is held to the new one.
adapted = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCABULARY = 41
STEEP = {"initializer_range": 0.3}  # weights large enough for attention and positions to matter


def model(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **settings: Any) -> Any:
    """A tiny model with random weights, of any architecture."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if kind not in ("gpt2", "gpt_neox"):
        sizes["num_key_value_heads"] = 1
    if kind == "mistral":
        sizes["sliding_window"] = None
    config = AutoConfig.for_model(kind, **(sizes | settings))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def pairs(count: int = 16, seed: int = 0) -> Pairs:
    draw = random.Random(seed)

    def lists(longest: int) -> list[list[int]]:
        return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]

    return Pairs(lists(6), lists(5), lists(5))


def one_by_one(net: Any, rows: Pairs) -> Tensor:
    """The second route: every response alone in a row, from the model's logits."""
    found = []
    for responses in (rows.chosen, rows.rejected):
        for prompt, response in zip(rows.prompts, responses, strict=True):
            ids = torch.tensor([[*prompt, *response]])
            tokens = net(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            found.append(tokens[len(prompt) - 1 :].sum())
    return torch.stack(found)


def batch(rows: Pairs, share_prompt: bool = True) -> dict[str, Tensor]:
    return PairCollator(share_prompt)([rows[k] for k in range(len(rows))])


# ---------------------------------------------------------------- the shared pass


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", SHARING)
def test_shared_pass_equals_two_rows_in_value_and_gradient(kind: str, attention: str) -> None:
    net = model(kind, attention, **STEEP).double().eval()
    rows = pairs(5)
    plain = one_by_one(net, rows)
    wanted = torch.autograd.grad(plain.square().sum(), list(net.parameters()))
    add_pair_scoring(net)
    for share in (True, False):
        found = net(pairs=batch(rows, share))
        # Norms, rotations and eager's softmax are computed in float32 by the models, whatever their dtype.
        assert torch.allclose(found.double(), plain, rtol=0, atol=1e-5)
        gradients = torch.autograd.grad(found.square().sum(), list(net.parameters()))
        scale = max(g.abs().max().item() for g in wanted)
        for got, want in zip(gradients, wanted, strict=True):
            assert (got - want).abs().max() < 1e-5 * scale


def test_the_rejected_response_sees_nothing_of_the_chosen_one() -> None:
    net = model(**STEEP).eval()
    add_pair_scoring(net)
    rows, other = pairs(6), pairs(6)
    other.chosen = pairs(6, seed=9).chosen
    before, after = (net(pairs=batch(each)).chunk(2) for each in (rows, other))
    assert torch.allclose(before[1], after[1], atol=1e-5)
    assert not torch.allclose(before[0], after[0], atol=1e-2)


@pytest.mark.parametrize(
    "mutant",
    [
        "positions run on",
        "rejected sees chosen",
        "first token from the token before",
        "a place too far on",
        "last layer skips a token",
    ],
)
def test_a_wrong_shared_pass_is_noticed(mutant: str) -> None:
    net = model(**STEEP).eval()
    rows = pairs(6)
    wanted = one_by_one(net, rows)
    add_pair_scoring(net)
    wrong = batch(rows)
    if mutant == "positions run on":
        wrong["position_ids"] = (wrong["places"] % wrong["segments"].shape[1])[None]
    elif mutant == "rejected sees chosen":
        wrong["segments"] = wrong["segments"].masked_fill(wrong["segments"] == 3, 2)
    elif mutant == "a place too far on":
        wrong["places"] = torch.where(
            wrong["segments"].flatten()[wrong["places"]] == 3, wrong["places"] - 1, wrong["places"]
        )
    elif mutant == "last layer skips a token":
        wrong["predicting"] = wrong["predicting"][wrong["predicting"] != wrong["sources"][wrong["owners"] >= 6][0]]
    else:
        first = torch.cat([wrong["owners"].new_zeros(1), wrong["owners"].diff()]) > 0
        chosen = torch.stack([wrong["sources"][wrong["owners"] == k][-1] for k in range(6)])
        wrong["sources"][first & (wrong["owners"] >= 6)] = chosen + 1
        wrong["predicting"] = wrong["sources"].unique()
    found = net(pairs=wrong)
    assert not torch.allclose(found[6:], wanted[6:], atol=1e-3)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "phi3"])
def test_other_architectures_score_two_rows_with_what_follows_their_head(kind: str) -> None:
    """Gemma caps its logits, Granite and Cohere scale them."""
    net = model(kind, "eager", **STEEP).eval()
    rows = pairs(4)
    wanted = one_by_one(net, rows)
    with pytest.raises(ValueError, match="share_prompt=False"):
        check_model(net, share_prompt=True)
    check_model(net, share_prompt=False)
    add_pair_scoring(net)
    assert torch.allclose(net(pairs=batch(rows, share_prompt=False)), wanted, atol=1e-4)


def test_what_cannot_share_is_refused() -> None:
    net = model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding_window = 8"):
        check_model(net, share_prompt=True)
    net = model()
    net.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        check_model(net, share_prompt=True)
    net.config.output_router_logits = True
    with pytest.raises(ValueError, match="auxiliary loss"):
        check_model(net, share_prompt=False)
    net.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder"):
        check_model(net, share_prompt=False)


def test_a_taught_model_is_the_same_model_and_so_is_its_copy() -> None:
    net = model().eval()
    ids = torch.tensor([[5, 6, 7]])
    logits, names = net(ids).logits, set(net.state_dict())
    add_pair_scoring(net)
    add_pair_scoring(net)
    twin = copy.deepcopy(net)
    assert torch.equal(net(ids).logits, logits)
    assert set(net.state_dict()) == names
    with torch.no_grad():
        net.lm_head.weight.zero_()
    assert torch.equal(twin(ids).logits, logits), "the copy does not call the original"
    assert twin(pairs=batch(pairs(2))).std() > 0


def test_no_table_of_all_positions_is_made() -> None:
    net = model(vocab_size=4001)
    add_pair_scoring(net)
    rows = Pairs([[3] * 20] * 4, [[4, 5]] * 4, [[6]] * 4)
    largest = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        if x.data_ptr() not in {weight.data_ptr() for weight in net.parameters()}:
            largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(pairs=batch(rows))
    assert largest <= 4 * 3 * 4001, "no more numbers than logits of the scored positions alone"


def test_score_keeps_the_order_and_the_mode() -> None:
    net = model()
    add_pair_scoring(net)
    rows = pairs(11)
    chosen, rejected = score(net, rows, batch_size=3)
    assert net.training
    assert np.allclose(np.concatenate([chosen, rejected]), one_by_one(net, rows).detach().numpy(), atol=1e-5)


# ---------------------------------------------------------------- rows


WORDS = ["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def row(prompt: str, chosen: str = "d", rejected: str = "e") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_tokens_are_prompt_and_response_and_end(tokenizer: Any) -> None:
    found = tokenize([row("a b", "c", ""), row("a", "d e", "c")], tokenizer, max_length=9)
    assert found.prompts == [[1, 3, 4], [1, 3]], "the end behind a prompt is taken away"
    assert found.chosen == [[5, 2], [6, 7, 2]]
    assert found.rejected == [[2], [5, 2]], "an empty response is the decision to stop"


def test_truncation_says_what_it_cuts(tokenizer: Any) -> None:
    rows = [row("a b c d", "a b c", "e"), row("a")]
    with pytest.raises(ValueError, match=r"row 0: the prompt has 5 tokens and the longer response 4, .* is 7"):
        tokenize(rows, tokenizer, max_length=7)
    cut = tokenize(rows, tokenizer, max_length=7, truncation="prompt")
    assert cut.prompts[0] == [1, 5, 6], "the beginning-of-sequence token and the end"
    assert cut.chosen[0] == [3, 4, 5, 2]
    cut = tokenize(rows, tokenizer, max_length=7, truncation="response")
    assert (cut.prompts[0], cut.chosen[0], cut.rejected[0]) == ([1, 3, 4, 5, 6], [3, 4], [7, 2])
    assert cut.counts == {"read": 2, "truncated: response": 1}
    cut = tokenize(rows, tokenizer, max_length=7, truncation="drop")
    assert len(cut) == 1
    assert cut.counts == {"read": 2, "dropped: longer than max_length": 1}
    with pytest.raises(ValueError, match="prompt alone fills it"):
        tokenize(rows, tokenizer, max_length=5, truncation="response")
    with pytest.raises(ValueError, match="response alone fills it"):
        tokenize(rows, tokenizer, max_length=5, truncation="prompt")
    with pytest.raises(ValueError, match="none of 2 rows is left"):
        tokenize(rows, tokenizer, max_length=2, truncation="drop")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], ValueError, "dataset is empty"),
        ([row("a"), {"prompt": "a", "chosen": "b"}], ValueError, "row 1: no column 'rejected'"),
        ([{**row("a"), "prompt": [{"role": "user", "content": "a"}]}], TypeError, "apply_chat_template"),
        ([{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [1]}], ValueError, "row 0: prompt_ids is empty.*BOS"),
        ([{"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": []}], ValueError, "rejected_ids is empty"),
    ],
)
def test_bad_rows_are_named(rows: Any, error: type[Exception], words: str, tokenizer: Any) -> None:
    with pytest.raises(error, match=words):
        tokenize(rows, tokenizer, max_length=9)


def test_known_references_come_along(tokenizer: Any) -> None:
    rows = [{**row("a"), "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}] * 2
    (win, lose) = tokenize(rows, tokenizer, max_length=9).reference
    assert win.tolist() == [-1.5, -1.5]
    assert lose.tolist() == [-2, -2]


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("name", losses.PAIRS)
def test_every_pair_objective_is_fed(name: str) -> None:
    win, lose = (torch.tensor(values, requires_grad=True) for values in ([-3.0, -4.0, -1.0], [-5.0, -2.0, -1.0]))
    reference = torch.tensor([-3.5, -4.0, -2.0]), torch.tensor([-4.0, -2.0, -2.0])
    lengths = torch.tensor([2, 3, 1]), torch.tensor([3, 1, 1])
    objective = Objective(name)
    values, metrics = objective(win, lose, *(reference if objective.needs_reference else (None, None)), lengths)
    assert values.shape == (3,)
    assert metrics.shape == (3, len(METRICS))
    values.sum().backward()
    share = win.grad.abs() / (win.grad.abs() + lose.grad.abs())
    assert torch.allclose(metrics[:, METRICS.index("lambda")], share, atol=1e-6, equal_nan=True)
    assert torch.equal(metrics[:, METRICS.index("loss")], values.detach())


def test_lambda_is_that_of_the_paper() -> None:
    win, lose = torch.tensor([-3.0]), torch.tensor([-5.0])
    values = {n: Objective(n)(win, lose, win, lose, (win, win))[1][0] for n in ("dpo", "nbdpo_asym", "bdpo")}
    shares = {name: metrics[METRICS.index("lambda")].item() for name, metrics in values.items()}
    assert shares["dpo"] == 0.5
    assert shares["bdpo"] == pytest.approx(5 / 8)
    assert shares["nbdpo_asym"] == pytest.approx(1.5 / 2.5), "log-ratio 2, clipped at 0.5"
    assert values["bdpo"][METRICS.index("gradient_log_ratio")].item() == pytest.approx(math.log(5 / 3))


def test_running_statistics_move_only_in_training() -> None:
    objective = Objective("alpha_dpo", momentum=0.75)
    win, lose = torch.tensor([-2.0, -4.0]), torch.tensor([-6.0, -4.0])
    inputs = (win, lose, torch.tensor([-4.0, -4.0]), torch.tensor([-4.0, -4.0]), (torch.tensor([2, 2]),) * 2)
    objective(*inputs, learn=False)
    assert objective.state == {"margin_mean": 0.0, "margin_std": 1.0}
    objective(*inputs)
    assert objective.state == {"margin_mean": 0.25, "margin_std": 1.0}  # margins a token 2 and 0: mean 1, deviation 1


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("dop", {}, "choose one of dpo"),
        ("kto", {}, "kind 'unpaired'"),
        ("reward_bt", {}, "kind 'reward'"),
        ("bdpo", {"clip": 1.0}, "no setting 'clip', only beta"),
        ("bdpo", {"beta": -1.0}, "beta = -1.0"),
    ],
)
def test_wrong_objectives_are_refused_at_once(name: str, settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Objective(name, settings)


# ---------------------------------------------------------------- the trainer


def arguments(folder: Path, **settings: Any) -> PreferenceArguments:
    return PreferenceArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "loss_settings": {"beta": 0.1},
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | settings
    )


def train(folder: Path, net: Any = None, rows: Any = None, ref: Any = None, **settings: Any) -> PreferenceTrainer:
    trainer = PreferenceTrainer(net or model(), arguments(folder, **settings), rows or pairs(), ref_model=ref)
    trainer.train()
    return trainer


def logged(trainer: PreferenceTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: PreferenceTrainer) -> Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in trainer.model.parameters()])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    return train(tmp_path_factory.mktemp("base"))


def test_it_learns_and_says_so_in_the_names_of_trl(base: PreferenceTrainer) -> None:
    assert logged(base)[0] == pytest.approx(math.log(2), abs=1e-6), "the policy begins as its reference"
    assert logged(base)[-1] < 0.69
    for name in METRICS:
        assert len(logged(base, name)) == 4
    assert logged(base, "rewards/margins") == pytest.approx(
        [a - b for a, b in zip(logged(base, "rewards/chosen"), logged(base, "rewards/rejected"), strict=True)], abs=1e-6
    )
    assert set(logged(base, "lambda")) == {0.5}
    assert set(logged(base, "gradient_log_ratio")) == {0.0}


def test_the_step_is_that_of_the_loss(tmp_path: Path) -> None:
    """The second route: one batch, DPO's formula, plain gradient descent."""
    net, rows = model(), pairs(8)
    win, lose = one_by_one(net, rows).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * ((win - win.detach()) - (lose - lose.detach()))).mean()
    wanted = [
        w - 0.5 * g for w, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True)
    ]
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "max_grad_norm": 0,
    }
    trainer = train(tmp_path, net, rows, **settings)
    assert torch.allclose(weights(trainer), torch.cat([w.detach().flatten() for w in wanted]), atol=1e-6)


#: Awkward pairs: equal responses, one the beginning of the other, single tokens, long ones; then ordinary ones.
ODD = Pairs(
    [[3], [4, 5, 6], [7, 8], [9], [10, 11, 12, 13], *pairs(6, 1).prompts],
    [[5, 6, 2], [7, 2], [2], [14, 15, 16, 17, 2], [18, 2], *pairs(6, 1).chosen],
    [[5, 6, 2], [7, 8, 9, 2], [3], [2], [18, 19, 20, 21, 22, 2], *pairs(6, 1).rejected],
)


def slowly(loss: str, settings: dict[str, Any], windows: list[list[int]], rate: float) -> tuple[list[float], Tensor]:
    """A trainer in a dozen lines: every response alone in a row, the mean of each window of pairs, AdamW."""
    net, spec = model(), losses.LOSSES[loss]
    with torch.no_grad():
        fixed = one_by_one(net, ODD).chunk(2)
    lengths = [torch.tensor([len(ids) for ids in side]).float() for side in (ODD.chosen, ODD.rejected)]
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    told = []
    for turn, window in enumerate(windows):
        optimizer.param_groups[0]["lr"] = rate * (1 - turn / len(windows))
        now = one_by_one(net, ODD).chunk(2)
        fed = dict(zip((*names, "chosen_lengths", "rejected_lengths"), (*now, *fixed, *lengths), strict=True))
        mean = spec(*(fed[name][window] for name in spec.needs), **settings).mean()
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        told.append(mean.item())
    return told, torch.cat([weight.detach().flatten() for weight in net.parameters()])


@pytest.mark.parametrize("drop_last", [False, True], ids=["last batch of one", "last batch dropped"])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [("dpo", {"beta": 0.3}), ("bdpo", {"beta": 0.3}), ("nbdpo_sym", {"beta": 0.3, "clip": 0.3}), ("simpo", {})],
)
def test_a_slow_trainer_takes_the_same_steps(
    loss: str, settings: dict[str, Any], drop_last: bool, tmp_path: Path
) -> None:
    """Eleven awkward pairs in batches of 2, three batches a step: the second step of an epoch has 5 pairs, or 4."""
    order: list[list[int]] = []

    class Noting(PairCollator):
        def __call__(self, items: Any) -> dict[str, Tensor]:
            order.append([ODD.prompts.index(item["prompt_ids"]) for item in items])
            return super().__call__(items)

    rows = Pairs(ODD.prompts, ODD.chosen, ODD.rejected)
    arranged = arguments(
        tmp_path,
        loss=loss,
        loss_settings=settings,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        dataloader_drop_last=drop_last,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
    )
    trainer = PreferenceTrainer(model(), arranged, rows)
    trainer.data_collator = Noting()
    trainer.train()
    epochs = [order[: len(order) // 2], order[len(order) // 2 :]]
    windows = [[row for part in epoch[k : k + 3] for row in part] for epoch in epochs for k in (0, 3)]
    assert [len(window) for window in windows] == ([6, 4, 6, 4] if drop_last else [6, 5, 6, 5])
    told, wanted = slowly(loss, settings, windows, 3e-3)
    assert logged(trainer) == pytest.approx(told, abs=2e-6)
    assert (weights(trainer) - wanted).abs().max() < 1e-4
    lengths = [[len(ODD.chosen[k]) for k in window] for window in windows]
    assert logged(trainer, "lengths/chosen") == pytest.approx([sum(one) / len(one) for one in lengths])


@pytest.mark.parametrize("share_prompt", [True, False])
def test_awkward_pairs_are_evaluated_one_by_one_whatever_the_batch(share_prompt: bool, tmp_path: Path) -> None:
    """Each pair weighs the same in every metric, also in a last batch of 1 or 3 that training would leave out."""
    found = []
    for size in (1, 4, 5, 11):
        arranged = arguments(
            tmp_path, per_device_eval_batch_size=size, share_prompt=share_prompt, dataloader_drop_last=True
        )
        trainer = PreferenceTrainer(
            model(seed=1), arranged, None, Pairs(ODD.prompts, ODD.chosen, ODD.rejected), ref_model=model()
        )
        found.append({k: v for k, v in trainer.evaluate().items() if "/" in k or k == "eval_loss"})
    with torch.no_grad():
        win, lose = one_by_one(model(seed=1), ODD).chunk(2)
        ref_win, ref_lose = one_by_one(model(), ODD).chunk(2)
    margins = 0.1 * ((win - ref_win) - (lose - ref_lose))
    assert margins[0] == 0, "equal responses"
    for one in found:
        assert one["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
        assert one["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
        assert one["eval_loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-6)
        assert one == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"share_prompt": False}, {"activation_checkpointing": True}, {"reference": "online"}],
    ids=["two rows", "checkpointing", "online reference"],
)
def test_ways_to_compute_it_are_one_trajectory(
    settings: dict[str, Any], base: PreferenceTrainer, tmp_path: Path
) -> None:
    other = train(tmp_path, ref=model() if "reference" in settings else None, **settings)
    assert logged(other) == pytest.approx(logged(base), abs=1e-6)
    assert (weights(other) - weights(base)).abs().max() < 1e-4  # AdamW at 0.01 magnifies the last bits of gradients


def test_bfloat16_is_near(base: PreferenceTrainer, tmp_path: Path) -> None:
    half = train(tmp_path, bf16=True)
    assert logged(half) == pytest.approx(logged(base), abs=2e-3)
    assert logged(half) != logged(base)


@adapted
@pytest.mark.parametrize("reference", ["precomputed", "online"])
def test_the_reference_of_an_adapter_is_the_model_without_it(reference: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )  # does something already
    torch.manual_seed(1)
    net = peft.get_peft_model(model(), config)
    frozen = {name: w.clone() for name, w in net.named_parameters() if not w.requires_grad}
    trainer = train(tmp_path, net, reference=reference, activation_checkpointing=True)
    bare = model()
    add_pair_scoring(bare)
    chosen, _ = score(bare, pairs())
    assert abs(logged(trainer)[0] - math.log(2)) > 1e-5
    assert all(torch.equal(w, frozen[name]) for name, w in trainer.model.named_parameters() if name in frozen)
    if reference == "precomputed":
        assert np.allclose(trainer.train_dataset.reference[0], chosen, atol=1e-5)
    else:
        first = trainer._reference_logps(batch(pairs()))[0]
        assert np.allclose(first.numpy(), chosen, atol=1e-5)


@adapted
def test_an_adapter_on_the_head_is_part_of_the_score() -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    net = peft.get_peft_model(model(), config).eval()
    wanted = one_by_one(net, pairs(4))
    add_pair_scoring(net)
    assert torch.allclose(net(pairs=batch(pairs(4))), wanted, atol=1e-5)
    with net.disable_adapter():
        assert not torch.allclose(net(pairs=batch(pairs(4))), wanted, atol=1e-3)


def test_evaluation_counts_each_pair_once_and_knows_its_reference(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(
        model(), arguments(tmp_path, per_device_eval_batch_size=4), pairs(), {"one": pairs(6, 1), "two": pairs(3, 2)}
    )
    before = trainer.evaluate()
    assert before["eval_one_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    after = trainer.evaluate(metric_key_prefix="eval")
    win, lose = score(trainer.model, trainer.eval_dataset["one"])
    margins = (win - trainer.eval_dataset["one"].reference[0]) - (lose - trainer.eval_dataset["one"].reference[1])
    assert after["eval_one_rewards/margins"] == pytest.approx(0.1 * margins.mean(), abs=1e-5)
    assert after["eval_one_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * margins)).mean(), abs=1e-5)
    with pytest.raises(ValueError, match="no reference for new pairs"):
        trainer.evaluate(pairs(4, 3))


def test_rows_of_text_are_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row("a b c", "d e", "a"), row("a", "e")] * 8
    trainer = PreferenceTrainer(model(), arguments(tmp_path, max_length=12), rows, processing_class=tokenizer)
    trainer.train()
    assert logged(trainer)[-1] < 0.69
    with pytest.raises(ValueError, match="context is 32 tokens"):
        PreferenceTrainer(model(), arguments(tmp_path, max_length=64), rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="pass processing_class"):
        PreferenceTrainer(model(), arguments(tmp_path), rows)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_objectives_without_a_reference_compute_none(name: str, tmp_path: Path) -> None:
    trainer = train(tmp_path, loss=name, loss_settings={})
    assert trainer.train_dataset.reference is None
    assert not (tmp_path / "reference.safetensors").exists()
    assert logged(trainer)[-1] < logged(trainer)[0]


@adapted
def test_unsupported_combinations_are_refused(tmp_path: Path) -> None:
    for settings, words in [
        ({"reference": "online"}, "pass ref_model"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "re-entrance"),
        ({"label_smoothing_factor": 0.1}, "conservative_dpo"),
    ]:
        with pytest.raises(ValueError, match=words):
            PreferenceTrainer(model(), arguments(tmp_path, **settings), pairs())
    with pytest.raises(ValueError, match="choose one of precomputed, online"):
        arguments(tmp_path, reference="none")
    net = model()
    with pytest.raises(ValueError, match="the model itself"):
        PreferenceTrainer(net, arguments(tmp_path), pairs(), ref_model=net)
    prompt = peft.get_peft_model(model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning"):
        PreferenceTrainer(prompt, arguments(tmp_path), pairs())


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    class Break(PreferenceTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 2:  # the third step: its weights and all after it are NaN
                self.model.lm_head.weight.grad.fill_(torch.nan)
            return loss

    trainer = Break(model(), arguments(tmp_path, save_strategy="steps", save_steps=1), pairs())
    with pytest.raises(TrainingDiverged, match=r"at step 3 .*learning rate.*checkpoint-2\. A lower learning rate"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    good = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.isfinite(weight).all() for weight in good.parameters())


def test_a_model_that_is_broken_from_the_start_stops_at_once(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.lm_head.weight.fill_(torch.nan)
    rows = pairs()
    rows.reference = (np.full(16, -9.0, np.float32),) * 2
    with pytest.raises(TrainingDiverged, match=r"at step 0 .*no checkpoint was written yet"):
        train(tmp_path, net, rows)


# ---------------------------------------------------------------- memory, on paper


def test_parameters_are_counted_without_allocating_them() -> None:
    net = model(tie_word_embeddings=True)
    counts = memory.count(net.config)
    assert counts.total == sum(weight.numel() for weight in net.parameters())
    assert (counts.embedding, counts.head) == (VOCABULARY * 16, 0)
    assert counts.layer == sum(weight.numel() for weight in net.model.layers[0].parameters())


def test_the_first_llama_has_6738_million_parameters() -> None:
    counts = memory.count(LlamaConfig())
    assert counts.total == 6_738_415_616
    assert counts.total == counts.embedding + counts.head + counts.layers * counts.layer + 4096
    on_one = memory.estimate(LlamaConfig(), checkpointing=True)
    assert on_one.weights + on_one.gradients + on_one.optimizer == 16 * counts.total
    assert not on_one.fits(80e9)
    on_eight = memory.estimate(LlamaConfig(), checkpointing=True, devices=8, sharding="fsdp")
    assert on_eight.fits(80e9)
    assert on_eight.communicated == pytest.approx(7 / 8 * 6 * counts.total)
    adapter = memory.estimate(LlamaConfig(), checkpointing=True, trainable=20_000_000)
    assert adapter.fits(24e9)
    assert "(20,000,000 trained)" in str(adapter)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4
    )
    net = AutoModelForCausalLM.from_config(config)
    net = net.bfloat16() if precision == "bf16" else net
    add_pair_scoring(net)
    own = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(pairs=batch(Pairs([[3] * 64] * 8, [[4] * 32] * 8, [[5] * 32] * 8)))
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    paper = memory.estimate(config, pairs=8, prompt_tokens=64, response_tokens=32, precision=precision)
    assert paper.activations == pytest.approx(measured, rel=0.1)


def test_the_page_on_scaling_shows_what_is_computed(root: Path) -> None:
    lengths = {"pairs": 8, "prompt_tokens": 192, "response_tokens": 96}
    table = memory.table(LlamaConfig(), **lengths)
    page = (root / "book" / "scaling.md").read_text()
    assert table in page, "paste the output of memory.table into book/scaling.md"

    def case(name: str, checkpointing: bool = True, **other: Any) -> memory.Estimate:
        return memory.estimate(LlamaConfig(), checkpointing=checkpointing, **(lengths | memory.CASES[name] | other))

    one, node, nodes = (case(name) for name in ("1 GPU, all weights", "8 GPUs, FSDP", "4 nodes of 8 GPUs, FSDP"))
    wide = case("the same, 32 pairs a GPU")
    words = " ".join(page.split())
    for sentence in (
        f"bytes a parameter, {(one.weights + one.gradients + one.optimizer) / 1e9:.0f} GB",
        f"layers keep theirs, {case('8 GPUs, FSDP', checkpointing=False).activations / 1e9:.0f} GB",
        f"in float32 would take {one.avoided / 1e9:.1f} GB",
        f"one row of {192 + 2 * 96} positions instead of two of {192 + 96}",
        f"{node.communicated / 1e9:.0f} GB with 8 GPUs",
        f"in {node.communicated / memory.NVLINK:.2f} s, behind {node.seconds:.2f} s of computation",
        f"the {nodes.communicated / 1e9:.0f} GB take {nodes.seconds:.2f} s",
        f"four nodes do {nodes.tokens_per_second / node.tokens_per_second:.1f} times what one does",
        f"computation takes {wide.seconds:.2f} s",
        f"trains {memory.CASES['1 GPU, LoRA of rank 16']['trainable'] / 1e6:.0f} million parameters",
    ):
        assert sentence in words, sentence


@pytest.mark.parametrize(("name", "processes"), [("fsdp-8gpu", 8), ("fsdp-4nodes", 32)])
def test_configuration_files_are_what_accelerate_reads(name: str, processes: int, root: Path) -> None:
    file = root / "bdpo" / "llm" / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == DistributedType.FSDP
    assert config.num_processes == processes
    asked = {key.removeprefix("fsdp_"): value for key, value in config.fsdp_config.items()}
    names = asked.pop("transformer_layer_cls_to_wrap").split(",")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=asked.pop("version"), transformer_cls_names_to_wrap=names)
    assert plugin.fsdp_version == 2
    assert not asked.keys() - {*vars(plugin), "offload_params"}, "accelerate knows every key"
    assert names == list(model()._no_split_modules)
    assert file.name in (root / "book" / "scaling.md").read_text()


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(model(), arguments(tmp_path), pairs())
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="use FSDP"):
        _check_distribution(accelerator, trainer.args)


def test_nonsense_is_not_estimated() -> None:
    with pytest.raises(ValueError, match="sharding"):
        memory.estimate(LlamaConfig(), sharding="zero3")
    with pytest.raises(ValueError, match="mfu"):
        memory.estimate(LlamaConfig(), mfu=0)
    with pytest.raises(ValueError, match="devices"):
        memory.estimate(LlamaConfig(), devices=0)
