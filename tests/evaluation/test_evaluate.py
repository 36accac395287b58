from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from threading import Barrier, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mtl.data.tokenized import TokenizedExample
from mtl.errors import UserError
from mtl.evaluation.evaluate import evaluate, select_examples, trivial_score

LABELS = ("yes", "no", "也许")
LABEL_ROWS = [("Is it?", "yes", LABELS), ("Was it really so, or not?", "no", LABELS), ("吗", "也许", LABELS)]
SETTINGS = {"split": "val", "max_examples": None, "predict": True, "token_budget": 10_000}


@pytest.fixture
def tasks(make_data, rows):
    return [
        make_data(rows, name="translate", metric="chrf", max_new_tokens=6),
        make_data(LABEL_ROWS, name="judge 👩‍⚖️", metric="accuracy", scoring="likelihood", labels=LABELS),
        make_data(rows[:2], name="text", metric="none", scoring="none"),
    ]


def fake_ranks(num_ranks):
    """Ranks as threads that exchange their objects through a list."""
    barrier, box = Barrier(num_ranks), [None] * num_ranks

    def gather(rank):
        def exchange(value):
            box[rank] = value
            barrier.wait(timeout=60)
            values = list(box)
            barrier.wait(timeout=60)
            return values

        return exchange

    return [SimpleNamespace(rank=r, world_size=num_ranks, sharded=False, gather=gather(r)) for r in range(num_ranks)]


def on_ranks(num_ranks, work):
    results = [None] * num_ranks

    def run(rank, distributed):
        results[rank] = work(rank, distributed)

    threads = [Thread(target=run, args=(r, d)) for r, d in enumerate(fake_ranks(num_ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def approximately(evaluation):
    predictions = [replace(item, loss=pytest.approx(item.loss, rel=1e-12)) for item in evaluation.predictions]
    losses = pytest.approx(list(evaluation.losses), rel=1e-12)
    return replace(evaluation, loss=pytest.approx(evaluation.loss, rel=1e-12), predictions=predictions, losses=losses)


def test_loss_is_the_mean_over_all_target_tokens(model, tokenizer, tasks, alone, no_adapters):
    evaluation = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)[0]
    total, num_targets = 0.0, 0
    for example in tasks[0].val:
        ids = torch.from_numpy(example.tokens.input_ids.astype(np.int64))
        log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        targets = np.flatnonzero(example.tokens.is_target)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in targets)
        num_targets += len(targets)
    assert evaluation.loss == pytest.approx(total / num_targets, rel=1e-12)
    assert (evaluation.num_examples, evaluation.num_targets) == (len(tasks[0].val), num_targets)


@pytest.mark.parametrize("token_budget", [1, 130])
def test_token_budget_does_not_change_the_result(model, tokenizer, tasks, alone, no_adapters, token_budget):
    plain = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)
    cut = evaluate(
        model, tokenizer, no_adapters, tasks, distributed=alone, **(SETTINGS | {"token_budget": token_budget})
    )
    assert cut == [approximately(evaluation) for evaluation in plain]


def test_ranks_do_not_change_the_result_and_all_get_it(build_model, tokenizer, tasks, alone, no_adapters):
    plain = evaluate(build_model("llama"), tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)
    models = [build_model("llama") for _ in range(4)]
    calls = [[] for _ in range(4)]
    split = on_ranks(
        4,
        lambda rank, distributed: evaluate(
            models[rank],
            tokenizer,
            no_adapters,
            tasks,
            distributed=distributed,
            progress=lambda *call: calls[rank].append(call),
            **SETTINGS,
        ),
    )
    assert split[0] == [approximately(evaluation) for evaluation in plain]
    assert all(result == split[0] for result in split)
    # Seven examples, each once for its loss and once for its answer, are shared out.
    assert [max(done for name, done, _ in rank if name == "translate") for rank in calls] == [4, 4, 4, 2]


def test_ranks_may_outnumber_the_examples(build_model, tokenizer, tasks, alone, no_adapters):
    few = SETTINGS | {"max_examples": 1}
    plain = evaluate(build_model("llama"), tokenizer, no_adapters, tasks, distributed=alone, **few)
    models = [build_model("llama") for _ in range(3)]
    split = on_ranks(
        3,
        lambda rank, distributed: evaluate(models[rank], tokenizer, no_adapters, tasks, distributed=distributed, **few),
    )
    assert split[0] == [approximately(evaluation) for evaluation in plain]
    assert all(result == split[0] for result in split)


def test_order_of_the_examples_does_not_change_the_loss(model, tokenizer, tasks, alone, no_adapters):
    losses = [
        evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **(SETTINGS | {"split": split}))[0].loss
        for split in ("val", "test")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


def test_predictions_stand_in_the_order_of_the_data(model, tokenizer, tasks, alone, no_adapters):
    translate, judge, text = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)
    assert [p.location for p in translate.predictions] == [e.location for e in tasks[0].val]
    assert [p.reference for p in translate.predictions] == [e.reference for e in tasks[0].val]
    assert translate.score == translate.scores["chrf"]
    assert all(p.prediction in LABELS and p.answer == p.prediction for p in judge.predictions)
    assert judge.score == sum(p.score for p in judge.predictions) / 3
    assert set(judge.scores) == {"accuracy", "macro_f1"}
    assert (text.metric, text.score, text.scores, text.predictions) == (None, None, {}, [])


def test_likelihood_takes_the_option_that_the_whole_model_prefers(model, tokenizer, tasks, alone, no_adapters):
    judge = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)[1]
    for example, prediction in zip(tasks[1].val, judge.predictions, strict=True):
        likelihoods = []
        for option in example.option_ids:
            ids = torch.tensor([example.prompt_ids + option])
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(example.prompt_ids) - 1
            likelihoods.append(sum(log_probs[start + i, token].item() for i, token in enumerate(option)))
        assert prediction.prediction == LABELS[int(np.argmax(likelihoods))]


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>"])
def test_a_model_that_says_nothing_is_wrong_everywhere(
    model, tokenizer, make_data, rows, encode, alone, no_adapters, token
):
    [only] = encode(token)
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, dtype=torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(only), model.config.vocab_size))
    for metric in ("exact_match", "chrf", "entity_f1", "phoneme_accuracy", "rougeL"):
        [evaluation] = evaluate(
            model, tokenizer, no_adapters, [make_data(rows, metric=metric)], distributed=alone, **SETTINGS
        )
        assert [p.prediction for p in evaluation.predictions] == [""] * len(rows)
        assert evaluation.score == 0
        assert len(evaluation.predictions) == evaluation.num_examples == len(rows)


def test_a_prompt_is_read_once_for_loss_and_answer(model, tokenizer, make_data, alone, no_adapters, watch):
    data = make_data([("q" * 40 + end, "answer", None) for end in "abc"], max_new_tokens=3)
    shapes = watch(model)
    evaluate(model, tokenizer, no_adapters, [data], distributed=alone, **SETTINGS)
    own = len(data.val[0].prompt_ids) - 41  # what all share: the user token and 40 letters
    assert shapes == [(1, 41), (3, own), (3, 6), (3, 1), (3, 1)]


def test_loss_only(model, tokenizer, tasks, alone, no_adapters):
    whole = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS)
    fast = evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **(SETTINGS | {"predict": False}))
    assert [e.loss for e in fast] == pytest.approx([e.loss for e in whole], rel=1e-12)
    assert all(e.score is None and not e.predictions for e in fast)


@pytest.mark.parametrize(("base", "active"), [(False, [0, 1, 2]), (True, [None] * 3)])
def test_each_task_is_evaluated_with_its_own_adapters(model, tokenizer, tasks, alone, base, active):
    switched = []

    @contextmanager
    def activate(task):
        switched.append(task)
        yield

    evaluate(model, tokenizer, activate, tasks, distributed=alone, base=base, **(SETTINGS | {"predict": False}))
    assert switched == active


def test_dropout_is_off_and_training_goes_on_after(model, tokenizer, tasks, alone, no_adapters):
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(
        model.model.layers[0].self_attn.q_proj, torch.nn.Dropout(0.5)
    )
    model.train()
    first, second = (evaluate(model, tokenizer, no_adapters, tasks, distributed=alone, **SETTINGS) for _ in range(2))
    assert first == second
    assert model.model.layers[0].self_attn.q_proj[1].training
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_progress_reaches_its_total_for_each_task(model, tokenizer, tasks, alone, no_adapters):
    calls = []
    evaluate(
        model,
        tokenizer,
        no_adapters,
        tasks,
        distributed=alone,
        progress=lambda *call: calls.append(call),
        **(SETTINGS | {"token_budget": 130}),
    )
    totals = {"translate": 14, "judge 👩‍⚖️": 3, "text": 2}
    assert {(name, total) for name, _, total in calls} == set(totals.items())
    for name, total in totals.items():
        done = [d for n, d, _ in calls if n == name]
        assert done == sorted(done)
        assert done[-1] == total


def test_a_part_of_the_examples_is_spread_over_the_split(make_data):
    data = make_data([(str(i), "a", None) for i in range(10)])
    assert [e.prompt for e in select_examples(data, "val", 4)] == ["0", "2", "5", "7"]
    assert len(select_examples(data, "val", 99)) == len(select_examples(data, "val", None)) == 10


def test_a_split_without_examples_is_refused(make_data):
    with pytest.raises(UserError, match=r"Task 'toy' has no val examples\..*tasks\.toy\.val_size"):
        select_examples(make_data([]), "val", None)


def test_trivial_score_of_a_task(make_data, rows):
    labels = make_data(LABEL_ROWS, metric="accuracy", majority="yes")
    assert trivial_score(labels, "val") == pytest.approx(1 / 3)
    assert trivial_score(labels, "val", 1) == 1
    options = make_data([("p", "a", ("a", "b")), ("q", "c", ("c", "d", "e", "f"))], metric="accuracy")
    assert trivial_score(options, "test") == pytest.approx(3 / 8)
    assert trivial_score(make_data(rows), "val") is None


def test_the_loss_is_the_same_whether_options_give_it_or_a_pass_of_its_own(model, tokenizer, tasks, alone, no_adapters):
    """One example whose prompt holds a target too, one that is cut short: their loss is no option's likelihood."""
    [judge] = [data for data in tasks if data.task.scoring == "likelihood"]
    several, cut, *rest = judge.val
    is_target = several.tokens.is_target.copy()
    is_target[2] = True
    val = [
        replace(several, tokens=TokenizedExample(several.tokens.input_ids, is_target)),
        replace(cut, tokens=TokenizedExample(cut.tokens.input_ids[:-1], cut.tokens.is_target[:-1])),
        *rest,
    ]
    data = [replace(judge, val=val)]
    scored, unscored = (
        evaluate(model, tokenizer, no_adapters, data, distributed=alone, **(SETTINGS | {"predict": predict}))[0]
        for predict in (True, False)
    )
    assert scored.score is not None
    assert unscored.score is None
    assert scored.loss == pytest.approx(unscored.loss, rel=1e-12)
    assert scored.num_targets == unscored.num_targets
