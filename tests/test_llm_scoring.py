"""Sampling, exact scores, divergence and learned judges: closed forms where there are any, two routes elsewhere."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from bdpo.llm import language as lang
from bdpo.llm import preferences, scoring, supervised
from bdpo.llm.scoring import Samples, agreement, cost_loss, exact, judge, judged, kl, sample, summary

TOKENS = lang.tokenizer()
PAD, BOS, EOS = range(3)
PROMPTS = lang.Language().prompts(24, 0, "test")


def near(model, size=0.02, seed=1):
    """A copy whose weights are moved a little."""
    other = lang.model(layers=1, width=32, heads=2)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return other.eval()


@pytest.fixture(scope="module")
def model():
    return lang.model(layers=1, width=32, heads=2, seed=0).eval()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def next_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def arguments(folder, **more):
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **quiet, dataloader_pin_memory=False, logging_steps=10**6, **more)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_models_own_probabilities(model):
    """All 81 words, so no top-k or top-p of the library's defaults; chi-square of 80 degrees, five deviations wide."""
    prompt, n = "tell politely river clock ?", 4000
    found = sample(model, TOKENS, [prompt] * n, seed=0, max_new_tokens=1, batch_size=1000)
    p = next_probabilities(model, TOKENS(prompt)["input_ids"]).numpy()
    counts = np.bincount([ids[0] for ids in found.response_ids], minlength=81)
    assert (n * p).min() > 5
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 80 + 5 * math.sqrt(160)


def test_a_model_that_carries_sampling_settings_is_sampled_at_the_settings_given(model):
    carrying = near(model, 0.0)
    carrying.generation_config.top_k, carrying.generation_config.temperature = 1, 0.01
    kwargs = {"seed": 3, "max_new_tokens": 4}
    assert sample(carrying, TOKENS, PROMPTS, **kwargs) == sample(model, TOKENS, PROMPTS, **kwargs)


def test_the_same_seed_gives_the_same_samples_and_leaves_torch_as_it_was(model):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = sample(model, TOKENS, PROMPTS, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, TOKENS, PROMPTS, seed=5) == first
    assert sample(model, TOKENS, PROMPTS, seed=6) != first


def test_at_temperature_zero_the_likeliest_words_are_taken_whatever_the_batch(model):
    together = sample(model, TOKENS, PROMPTS, seed=0, temperature=0, max_new_tokens=3)
    alone = sample(model, TOKENS, PROMPTS, seed=1, temperature=0, max_new_tokens=3, batch_size=1)
    assert together == alone
    for start, answer in zip(together.prompt_ids, together.response_ids, strict=True):
        for k, token in enumerate(answer):
            assert token == int(next_probabilities(model, start + answer[:k]).argmax())


def test_responses_end_at_the_first_end_token_or_are_cut_off(model):
    found = sample(model, TOKENS, PROMPTS * 5, seed=0, max_new_tokens=16)
    assert len(found) == 120
    assert {True, False} == set(found.ended)
    for text, ended, ids in zip(found.responses, found.ended, found.response_ids, strict=True):
        assert (EOS in ids) == ended
        assert ids.index(EOS) == len(ids) - 1 if ended else len(ids) == 16
        assert text.split() == [lang.VOCABULARY[k] for k in ids if k != EOS]


def test_sampling_restores_the_mode_of_the_model(model):
    other = near(model).train()
    sample(other, TOKENS, PROMPTS[:2], seed=0, max_new_tokens=1)
    kl(other, model, TOKENS, sample(other, TOKENS, PROMPTS[:2], seed=0))
    assert other.training
    assert not model.training


def test_a_tokenizer_that_ends_prompts_loses_that_end(model):
    class Ending:
        pad_token_id, eos_token_id, batch_decode = PAD, EOS, staticmethod(TOKENS.batch_decode)

        def __call__(self, texts, **settings):
            return {"input_ids": [[*ids, EOS] for ids in TOKENS(texts, **settings)["input_ids"]]}

    plain = sample(model, TOKENS, PROMPTS[:3], seed=0, max_new_tokens=3)
    assert sample(model, Ending(), PROMPTS[:3], seed=0, max_new_tokens=3) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts: 0 given"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 given"),
        ({"batch_size": 0}, "batch_size: 0 given"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"tokenizer": types.SimpleNamespace(pad_token_id=None, eos_token_id=2)}, "no padding token; set"),
        ({"tokenizer": types.SimpleNamespace(pad_token_id=0, eos_token_id=None)}, "no end-of-sequence token; set"),
    ],
)
def test_sampling_refuses_bad_settings(model, settings, message):
    call = {"model": model, "tokenizer": TOKENS, "prompts": PROMPTS, "seed": 0} | settings
    with pytest.raises(ValueError, match=message):
        sample(**call)


# --- exact scores and the paper's columns -----------------------------------------------------------------------------


def made(prompts, responses, ended=None):
    """Samples of given texts."""
    ended = [True] * len(prompts) if ended is None else ended
    answers = TOKENS(responses, add_special_tokens=False)["input_ids"]
    answers = [ids + [EOS] * end for ids, end in zip(answers, ended, strict=True)]
    return Samples(prompts, responses, ended, TOKENS(prompts)["input_ids"], answers, 1.0)


def test_exact_scores_are_those_of_the_language():
    prompt = "tell orderly river lock ?"
    rows = exact(made([prompt] * 3, ["water picklock", "water sorry", "water <bos>"], [True, True, False]))
    assert [row["help"] for row in rows] == [1.25, 0.5 + 0.25 - 0.1, 0.5 + 0.25 - 0.25 - 1]
    assert [row["harm"] for row in rows] == [-0.2, -1.5, -1.0]
    assert [row["safe"] for row in rows] == [True, True, True]
    assert [row["length"] for row in rows] == [3, 3, 2]
    assert [row["well_formed"] for row in rows] == [True, True, False]


def test_the_summary_has_means_per_cent_and_standard_errors():
    rows = [{"help": h, "harm": c, "safe": c < 0} for h, c in ((0.0, -1.0), (1.0, 1.0), (2.0, -3.0), (3.0, -1.0))]
    out = summary(rows)
    assert (out["n"], out["Help"], out["Harm"], out["S.R."]) == (4, 1.5, -1.0, 75.0)
    assert out["Help_se"] == pytest.approx(math.sqrt(5 / 3 / 4))
    assert out["S.R._se"] == pytest.approx(100 * math.sqrt(0.25 / 4))
    assert summary(rows[:1])["Help_se"] == 0
    with pytest.raises(ValueError, match="rows: 0 given"):
        summary([])


def test_the_oracles_bound_what_is_sampled(model):
    rows = exact(sample(model, TOKENS, PROMPTS, seed=0))
    best = exact(made(PROMPTS, [lang.full(p) for p in PROMPTS]))
    safest = exact(made(PROMPTS, [lang.refuse(p) for p in PROMPTS]))
    assert all(row["help"] <= top["help"] for row, top in zip(rows, best, strict=True))
    assert all(row["harm"] >= low["harm"] for row, low in zip(rows, safest, strict=True))
    assert summary(best)["Help"] == 1.25
    assert summary(safest)["S.R."] == 100


# --- divergence -------------------------------------------------------------------------------------------------------


def divergence(p, q):
    return float((p * (p / q).log()).sum())


def test_the_divergence_of_one_token_is_its_closed_form(model):
    """The exact estimator does not depend on what was sampled first."""
    other = near(model, 0.1)
    found = sample(model, TOKENS, PROMPTS, seed=0, max_new_tokens=1)
    expected = [divergence(*(next_probabilities(m, TOKENS(p)["input_ids"]) for m in (model, other))) for p in PROMPTS]
    assert kl(model, other, TOKENS, found) == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 1e-3


@pytest.mark.parametrize("estimator", scoring.ESTIMATORS)
def test_the_divergence_of_two_tokens_is_estimated_without_bias(model, estimator):
    """By the chain rule, with a sum over the first word; nothing follows an end."""
    other, prompt, n = near(model, 0.1), "tell politely river clock ?", 2000
    start = TOKENS(prompt)["input_ids"]
    first = [next_probabilities(m, start) for m in (model, other)]
    rows = torch.tensor([[*start, v] for v in range(81)])
    with torch.no_grad():
        second = [m(input_ids=rows).logits[:, -1].double().softmax(-1) for m in (model, other)]
    then = (second[0] * (second[0] / second[1]).log()).sum(-1)
    then[EOS] = 0
    expected = divergence(*first) + float((first[0] * then).sum())
    found = kl(model, other, TOKENS, sample(model, TOKENS, [prompt] * n, seed=1, max_new_tokens=2), estimator=estimator)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(n)
    assert found.std() / math.sqrt(n) < expected / 4
    assert estimator == "k1" or found.min() > -1e-5


def test_the_exact_estimator_varies_least(model):
    other = near(model, 0.1)
    found = sample(model, TOKENS, PROMPTS * 8, seed=2)
    spread = {name: kl(model, other, TOKENS, found, estimator=name).std() for name in scoring.ESTIMATORS}
    assert spread["exact"] == min(spread.values())


@pytest.mark.parametrize("estimator", scoring.ESTIMATORS)
def test_the_divergence_from_itself_is_zero_and_padding_changes_nothing(model, estimator):
    found, other = sample(model, TOKENS, PROMPTS, seed=3), near(model)
    assert np.array_equal(kl(model, model, TOKENS, found, estimator=estimator), np.zeros(len(PROMPTS)))
    alone = kl(model, other, TOKENS, found, estimator=estimator, batch_size=1)
    assert kl(model, other, TOKENS, found, estimator=estimator) == pytest.approx(alone, abs=2e-5)


def test_the_divergence_refuses_what_it_cannot_estimate(model):
    hot = sample(model, TOKENS, PROMPTS[:2], seed=0, temperature=2.0)
    with pytest.raises(ValueError, match=r"samples at temperature 2\.0"):
        kl(model, model, TOKENS, hot)
    cold = sample(model, TOKENS, PROMPTS[:2], seed=0)
    with pytest.raises(ValueError, match="estimator is 'k2'; allowed: exact, k1, k3"):
        kl(model, model, TOKENS, cold, estimator="k2")
    with pytest.raises(ValueError, match="samples: 0 given"):
        kl(model, model, TOKENS, Samples([], [], [], [], [], 1.0))
    wide = near(model)
    wide.resize_token_embeddings(90, mean_resizing=False)
    with pytest.raises(ValueError, match="vocabularies of 81 and 90"):
        kl(model, wide, TOKENS, cold)


# --- learned judges ---------------------------------------------------------------------------------------------------


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(("safer_safe", "other_safe"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize(("safer", "other"), [(0.0, 0.0), (-1.0, 2.0), (3.0, -0.5)])
def test_the_cost_loss_is_its_formula(safer, other, safer_safe, other_safe):
    """-log σ(x) is log(1 + exp(-x)); an unsafe response should cost more than 0, a safe one less."""
    expected = softplus(safer - other)
    expected += softplus(safer) if safer_safe else softplus(-safer)
    expected += softplus(other) if other_safe else softplus(-other)
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (safer, other)]
    flags = [torch.tensor([x]) for x in (safer_safe, other_safe)]
    assert float(cost_loss(*numbers, *flags)) == pytest.approx(expected, rel=1e-12)
    assert cost_loss(*numbers, *flags).shape == (1,)


def test_the_cost_loss_pulls_costs_apart_and_to_their_sides():
    cost = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    cost_loss(cost[:1], cost[1:], torch.tensor([True]), torch.tensor([False])).sum().backward()
    assert cost.grad.tolist() == [1.0, -1.0]  # 1/2 by the comparison, 1/2 by the sign


def test_the_cost_loss_wants_boolean_flags():
    zero, flag = torch.zeros(1), torch.tensor([True])
    with pytest.raises(TypeError, match=r"other_safe is torch.int64; allowed: torch.bool"):
        cost_loss(zero, zero, flag, flag.long())


def test_an_untrained_judge_gives_zero_on_a_copy_of_the_body(model):
    scorer = judge(model, pad_token_id=PAD)
    assert not judged(scorer, TOKENS, PROMPTS, ["sorry"] * len(PROMPTS)).any()
    body = scorer.base_model.state_dict()
    assert all(torch.equal(body[name], weight) for name, weight in model.base_model.state_dict().items())
    with torch.no_grad():
        scorer.base_model.embed_tokens.weight.zero_()
    assert model.base_model.embed_tokens.weight.abs().sum() > 0
    assert model.config.num_labels == 2  # transformers' default: the backbone's configuration is not touched


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2"])
def test_other_architectures_are_sampled_compared_and_judged(kind):
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else SMALL
    shape |= {"num_key_value_heads": 2} if kind == "qwen2" else {}
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(kind, vocab_size=81, max_position_embeddings=64, **ids, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy, reference = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
        scorer = judge(policy, pad_token_id=PAD)
        torch.nn.init.normal_(scorer.score.weight)
    found = sample(policy, TOKENS, PROMPTS[:6], seed=0, max_new_tokens=4)
    alone = kl(policy, reference, TOKENS, found, batch_size=1)
    assert alone.min() > 0
    assert kl(policy, reference, TOKENS, found) == pytest.approx(alone, abs=1e-5)
    texts = TOKENS, found.prompts, found.responses
    assert judged(scorer, *texts) == pytest.approx(judged(scorer, *texts, batch_size=1), abs=1e-4)
    assert judged(scorer, *texts).std() > 0.1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_judge_is_not_built_on_an_adapter(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(near(model), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="merge its adapter first"):
        judge(adapted, pad_token_id=PAD)


@pytest.fixture(scope="module")
def supervised_model(tmp_path_factory):
    torch.set_num_threads(1)
    model = lang.model(layers=2, width=32, heads=2, seed=0)
    rows = lang.Language().demonstrations(4000, 0)
    args = arguments(tmp_path_factory.mktemp("sft"), per_device_train_batch_size=64, max_steps=60, learning_rate=1e-2)
    supervised.trainer(model, args, rows, TOKENS, max_length=64).train()
    return model.eval()


def test_supervised_learning_gives_the_words_of_the_language(supervised_model):
    """Sixty steps of a tiny network: responses end and are mostly made of what a response is made of."""
    rows = exact(sample(supervised_model, TOKENS, PROMPTS * 5, seed=0))
    before = exact(sample(lang.model(layers=2, width=32, heads=2), TOKENS, PROMPTS * 5, seed=0))
    assert np.mean([row["well_formed"] for row in rows]) > 0.6
    assert np.mean([row["well_formed"] for row in before]) < 0.1
    assert summary(rows)["Help"] > summary(before)["Help"] + 0.5


LABEL = {"reward": "helpful", "cost": "safe"}


@pytest.fixture(scope="module", params=scoring.JUDGES)
def trained(request, supervised_model, tmp_path_factory):
    """A judge of each kind, what it was before training, and rows it has not seen."""
    torch.set_num_threads(1)
    language, kind = lang.Language(), request.param
    rows, unseen = (
        preferences.from_rows(language.pairs(n, 0, split=split), label=LABEL[kind]).rows
        for n, split in ((800, "train"), (300, "test"))
    )
    args = arguments(
        tmp_path_factory.mktemp(kind),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        num_train_epochs=2,
        learning_rate=5e-3,
    )
    model = judge(supervised_model, pad_token_id=PAD)
    trainer = scoring.JudgeTrainer(model, args, rows, TOKENS, kind=kind, max_length=64, validation=unseen)
    before = trainer.evaluate()
    trainer.train()
    return types.SimpleNamespace(kind=kind, before=before, after=trainer.evaluate(), model=model.eval(), unseen=unseen)


def test_before_training_a_judge_is_at_chance(trained):
    assert trained.before["eval_loss"] == pytest.approx((1 if trained.kind == "reward" else 3) * math.log(2), rel=1e-6)
    assert trained.before["eval_accuracy"] == 0.5
    assert ("eval_sign_accuracy" in trained.before) == (trained.kind == "cost")


def test_a_judge_learns_to_order_unseen_pairs(trained):
    assert trained.after["eval_accuracy"] > {"reward": 0.6, "cost": 0.7}[trained.kind]
    assert trained.kind == "reward" or trained.after["eval_sign_accuracy"] > 0.8


def test_the_accuracy_is_that_of_scores_given_one_by_one(trained):
    columns = {side: [row[side] for row in trained.unseen] for side in ("prompt", "chosen", "rejected")}
    win, lose = (judged(trained.model, TOKENS, columns["prompt"], columns[s]) for s in ("chosen", "rejected"))
    right = win > lose if trained.kind == "reward" else win < lose
    assert trained.after["eval_accuracy"] == pytest.approx(right.mean(), abs=0.01)
    if trained.kind == "cost":
        safe = np.array([[row["chosen_safe"], row["rejected_safe"]] for row in trained.unseen])
        signs = (np.stack([win, lose], 1) < 0) == safe
        assert trained.after["eval_sign_accuracy"] == pytest.approx(signs.mean(), abs=0.01)


def test_a_judge_agrees_with_the_exact_scores(trained):
    texts = [row["chosen"] for row in trained.unseen]
    prompts = [row["prompt"] for row in trained.unseen]
    true = [getattr(s, "help" if trained.kind == "reward" else "harm") for s in lang.scores(prompts, texts)]
    assert agreement(true, judged(trained.model, TOKENS, prompts, texts))["rank_correlation"] > 0.3


def test_a_score_depends_neither_on_the_batch_nor_on_padding(trained):
    prompts, texts = [row["prompt"] for row in trained.unseen[:30]], [row["chosen"] for row in trained.unseen[:30]]
    alone = judged(trained.model, TOKENS, prompts, texts, batch_size=1)
    assert judged(trained.model, TOKENS, prompts, texts) == pytest.approx(alone, abs=1e-4)
    cut = judged(trained.model, TOKENS, prompts, texts, ended=[False] * 30)
    assert np.abs(cut - alone).max() > 1e-3


def test_a_judge_survives_saving(trained, tmp_path):
    trained.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert np.array_equal(
        judged(again, TOKENS, PROMPTS[:5], ["sorry"] * 5), judged(trained.model, TOKENS, PROMPTS[:5], ["sorry"] * 5)
    )
    assert not list(tmp_path.glob("*.bin"))


def test_judging_refuses_what_it_cannot_read(trained):
    with pytest.raises(ValueError, match="responses: 0 given"):
        judged(trained.model, TOKENS, [], [])
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        judged(trained.model, TOKENS, PROMPTS[:2], ["sorry"])
    with pytest.raises(ValueError, match=r"text 1 has .* tokens; the judge's context has 64"):
        judged(trained.model, TOKENS, PROMPTS[:2], ["sorry", "sorry " * 100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "safety"}, "kind is 'safety'; allowed: reward, cost"),
        ({"truncation": "drop"}, "a judge takes 'error', 'prompt' or 'response'"),
        ({"rows": []}, "no rows"),
        ({"max_length": 4}, "max_length is 4"),
        ({"kind": "cost"}, r"row 0: chosen_safe and rejected_safe are \[None, None\]"),
        ({"model": types.SimpleNamespace(config=types.SimpleNamespace(num_labels=2))}, "2 scores a text"),
    ],
)
def test_training_a_judge_refuses_bad_input(model, tmp_path, change, message):
    rows = [{"prompt": PROMPTS[0], "chosen": "water", "rejected": "sorry"}]
    call = {"model": judge(model, pad_token_id=PAD), "rows": rows, "kind": "reward", "max_length": 64} | change
    with pytest.raises(ValueError, match=message):
        scoring.JudgeTrainer(args=arguments(tmp_path), tokenizer=TOKENS, **call)


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_of_equal_opposed_and_constant_evaluators():
    x = [0.0, -1.0, 2.0, -3.0]
    assert agreement(x, [5 * v for v in x]) == {"rank_correlation": pytest.approx(1), "pairs": 1, "sign": 1}
    assert agreement(x, [-v for v in x])["pairs"] == 0
    assert agreement(x, [-v for v in x])["rank_correlation"] == pytest.approx(-1)
    constant = agreement(x, [1.0] * 4)
    assert math.isnan(constant["pairs"])
    assert math.isnan(constant["rank_correlation"])
    assert constant["sign"] == 0.5


def test_agreement_over_pairs_is_the_count_over_all_pairs():
    rng = np.random.default_rng(0)
    true, learned = rng.integers(0, 5, 60), rng.integers(0, 5, 60)
    pairs = [(a, b) for a, b in itertools.combinations(range(60), 2) if true[a] != true[b]]
    right = sum((true[a] - true[b]) * (learned[a] - learned[b]) > 0 for a, b in pairs)
    ties = sum(learned[a] == learned[b] for a, b in pairs)
    assert agreement(true, learned)["pairs"] == pytest.approx((right + ties / 2) / len(pairs))


@pytest.mark.parametrize(
    ("true", "learned", "message"),
    [([1.0], [1.0], "at least 2"), ([1.0, 2.0], [1.0], "one length"), ([1.0, 2.0], [1.0, math.nan], "not finite")],
)
def test_agreement_refuses_what_it_cannot_compare(true, learned, message):
    with pytest.raises(ValueError, match=message):
        agreement(true, learned)
