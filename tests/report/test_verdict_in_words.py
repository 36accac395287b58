"""The sentences of a comparison, whole; and how its tables fit narrow and wide terminals."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from mtl.report.comparison import Duel, Interval, Verdict
from mtl.report.terminal import print_comparison
from mtl.report.words import number, percent, sentences, with_interval

CHANGES = {
    "pcgrad": {"sentiment": 0.2, "inflect": 0.1},
    "equal": {"sentiment": 0.15, "inflect": 0.05},
    "rlw": {"sentiment": -0.1, "inflect": 0.02},
}
CLEAN = {name: dict.fromkeys(own, 0.1) for name, own in CHANGES.items()}


def duel(other, low, *, p=0.004, sign_flip=0.25, num_seeds=3):
    return Duel(other, Interval(low + 0.05, low, low + 0.1), p, sign_flip, num_seeds)


def verdicts_of(comparison, *duels, aggregate="mean"):
    return sentences(replace(comparison, verdicts=[Verdict(aggregate, "pcgrad", duels)]))


def test_decided(make_comparison):
    found = verdicts_of(make_comparison(CHANGES), duel("equal", 0.01), duel("rlw", 0.2))
    assert found[0] == (
        "Best for the mean over the tasks: pcgrad, +15.0 % [+10.0 %, +20.0 %] against single-task. The test examples "
        "tell it from every other strategy (closest: equal, difference +6.0 % [+1.0 %, +11.0 %]); over the seeds the "
        "lowest sign-flip p is 0.25, and 3 seeds can't give less than 0.25."
    )


def test_undecided(make_comparison):
    found = verdicts_of(make_comparison(CHANGES), duel("equal", -0.01, p=0.2), duel("rlw", 0.01, p=0.06))
    assert found[0] == (
        "Undecided for the mean over the tasks: pcgrad is ahead, +15.0 % [+10.0 %, +20.0 %] against single-task, but "
        "the data do not tell it from any other strategy; over the seeds the lowest sign-flip p is 0.25, and 3 seeds "
        "can't give less than 0.25."
    )


def test_partly_decided_for_the_worst_task(make_comparison):
    duels = duel("equal", -0.03, p=0.3, sign_flip=None, num_seeds=1), duel("rlw", 0.2, sign_flip=None, num_seeds=1)
    found = verdicts_of(make_comparison(CHANGES), *duels, aggregate="worst")
    assert found[0] == (
        "Not fully decided for the worst task: pcgrad is ahead, +10.0 % [+5.0 %, +15.0 %] against single-task "
        "(inflect), and the data tell it from 1 of the 2 others, but not from equal; one seed says nothing of another."
    )


def test_many_open_names_are_counted(make_comparison):
    changes = {f"s{place}": {"sentiment": -place / 100} for place in range(10)}
    duels = [duel(f"s{place}", -0.02) for place in range(1, 9)] + [duel("s9", 0.1)]
    comparison = replace(make_comparison(changes), verdicts=[Verdict("mean", "s0", duels)])
    assert "from 1 of the 9 others, but not from s1, s2, s3, s4, s5 and 3 more; over" in sentences(comparison)[0]


@pytest.mark.parametrize(
    ("duels", "ending"),
    [
        ([("a", 0.03125, 6), ("b", 0.5, 3)], "; over the seeds the lowest sign-flip p is 0.0312."),
        ([("a", 0.25, 6), ("b", 0.25, 3)], "lowest sign-flip p is 0.25, and 3 seeds can't give less than 0.25."),
        ([("a", 0.0625, 5), ("b", None, 1)], "p is 0.0625, and 5 seeds can't give less than 0.0625."),
        ([("a", None, 0), ("b", None, 0)], "; without a seed in common nothing is paired by it."),
        ([("a", None, 0), ("b", None, 1)], "; one seed says nothing of another."),
        ([("a", math.nan, 3), ("b", 0.5, 3)], "p is 0.5, and 3 seeds can't give less than 0.25."),
        ([("a", math.nan, 3), ("b", math.nan, 3)], "but the data do not tell it from any other strategy."),
    ],
)
def test_what_the_seeds_add(make_comparison, duels, ending):
    duels = [duel(name, -0.02, sign_flip=p, num_seeds=num_seeds) for name, p, num_seeds in duels]
    assert verdicts_of(make_comparison(CHANGES), *duels)[0].endswith(ending)


def test_a_single_strategy(make_comparison):
    comparison = make_comparison({"pcgrad": CHANGES["pcgrad"]})
    assert sentences(comparison) == [
        "pcgrad: mean over the tasks +15.0 % [+10.0 %, +20.0 %] against single-task, worst task inflect +10.0 % "
        "[+5.0 %, +15.0 %].",
        "With pcgrad, no task is worse than single-task by its whole interval.",
    ]
    assert sentences(make_comparison({"pcgrad": CHANGES["pcgrad"]}, compared=False)) == [
        "pcgrad: mean over the tasks 0.575 [0.525, 0.625], worst task inflect 0.550 [0.500, 0.600]."
    ]


def test_tasks_hurt(make_comparison):
    assert sentences(make_comparison(CHANGES))[1:] == [
        "With pcgrad and equal, no task is worse than single-task by its whole interval.",
        "rlw leaves sentiment worse than single-task by the whole interval.",
    ]


def test_a_task_hurt_by_chance(make_comparison):
    """Of many intervals some lie below 0 by chance; the adjusted p allows for that."""
    comparison = make_comparison({"rlw": {"sentiment": -0.2, "inflect": -0.1}, "equal": {"sentiment": 0, "inflect": 0}})
    rlw = comparison.strategies[0]
    for p, ending in ((0.06, "none of them"), (0.01, "sentiment")):
        tasks = rlw.tasks | {"inflect": replace(rlw.tasks["inflect"], p_adjusted=0.07)}
        tasks |= {"sentiment": replace(rlw.tasks["sentiment"], p_adjusted=p)}
        strategies = [replace(rlw, tasks=tasks), comparison.strategies[1]]
        assert (
            "rlw leaves sentiment and inflect worse than single-task by the whole interval; adjusted for the number of "
            f"tasks, p is below .05 in {ending}."
        ) in sentences(replace(comparison, strategies=strategies))


def test_a_task_hurt_everywhere(make_comparison):
    changes = {name: own | {"inflect": -0.3} for name, own in CHANGES.items()}
    assert sentences(make_comparison(changes))[1:] == [
        "pcgrad leaves inflect worse than single-task by the whole interval.",
        "equal leaves inflect worse than single-task by the whole interval.",
        "rlw leaves sentiment and inflect worse than single-task by the whole interval.",
        "Every strategy leaves inflect worse than single-task.",
    ]


def test_failures(make_comparison):
    one = make_comparison(CLEAN, failures={"broken,seed=0": "batch_size=0: must be above 0."})
    assert sentences(one)[-1] == "Failed, and not in here: 1 job, broken,seed=0."
    two = make_comparison(CLEAN, failures={"a,seed=0": "no", "a,seed=1": "no"})
    assert sentences(two)[-1] == "Failed, and not in here: 2 jobs, a,seed=0 and a,seed=1."


def test_without_intervals_there_are_none_in_the_sentences(make_comparison):
    found = verdicts_of(make_comparison(CHANGES, half_width=math.nan), duel("equal", math.nan), duel("rlw", math.nan))
    assert found[0].startswith(
        "Undecided for the mean over the tasks: pcgrad is ahead, +15.0 % against single-task, but the data do not tell"
    )
    assert "nan" not in " ".join(found)


def test_numbers(make_comparison):
    with_reference, without = make_comparison(CLEAN), make_comparison(CLEAN, compared=False)
    assert (percent(0.0123), percent(-0.5), percent(math.nan)) == ("+1.2 %", "-50.0 %", "unknown")
    assert [number(0.1234, with_reference), number(0.1234, without)] == ["+12.3 %", "0.123"]
    assert [number(math.nan, with_reference), number(math.nan, without)] == ["unknown", "unknown"]
    assert with_interval(Interval(0.5, 0.25, 0.75), without) == "0.500 [0.250, 0.750]"
    assert with_interval(Interval(0.5, math.nan, math.nan), without) == "0.500"


def printed(comparison, width):
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    print_comparison(console, comparison)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_at_80_columns_the_name_and_the_changes_are_whole(make_comparison):
    lines = printed(make_comparison(CHANGES), 80)
    assert next(line.split() for line in lines if line.startswith("strategy")) == [
        *("strategy", "mean", "[95", "%]", "worst", "task", "hurt", "rank", "seeds", "Mtokens"),
    ]
    row = next(line for line in lines if line.startswith("pcgrad"))
    assert row.split()[:10] == ["pcgrad", "+15.0", "%", "[+10.0", "%,", "+20.0", "%]", "+10.0", "%", "inflect"]


def test_at_160_columns_there_is_the_cost_too(make_comparison):
    lines = printed(make_comparison(CHANGES), 160)
    assert next(line for line in lines if line.startswith("strategy")).split()[-3:] == ["Mtokens", "minutes", "GB"]
    row = next(line for line in lines if line.startswith("rlw"))
    assert row.split()[-6:] == ["1", "1.50", "3", "0.03", "1.2", "1.00"]
    assert next(line.split() for line in lines if line.startswith("sentiment")) == [
        *("sentiment", "accuracy", "0.250", "0.500", "0.600>", "0.575>", "0.450<"),
    ]


@pytest.mark.parametrize("width", [80, 160])
def test_long_names_are_folded_and_never_cut(make_comparison, width):
    name = "gradient_vaccine,temperature=5.0,learning_rate=0.0003"
    task = "a_task_of_a_name_as_long_as_this_one"
    changes = {name: {task: -0.2, "inflect": 0.1}, "梯度": {task: -0.3, "inflect": 0.1}}
    lines = printed(make_comparison(changes), width)
    lines = lines[lines.index("") :]  # below the sentences
    place = next(number for number, line in enumerate(lines) if line.startswith("gradient_vac"))
    column = lines[place].index(" ")
    end = next(number for number, line in enumerate(lines) if line.startswith("梯"))
    assert "".join(line[:column].strip() for line in lines[place:end]).startswith(name)
    assert "-5.0 %" in lines[place]
    assert "[-10.0 %, +0.0 %]" in lines[place]
    assert "-20.0 %" in lines[place]


@pytest.mark.parametrize(("width", "num_shown"), [(80, 3), (160, 8)])
def test_of_many_strategies_the_best_stand_side_by_side(make_comparison, width, num_shown):
    changes = {f"strategy_{place}": {"sentiment": 0.5 - place / 100} for place in range(33)}
    text = "\n".join(printed(make_comparison(changes), width))
    assert "and 3 more strategies, which the page and summary.csv have" in text
    assert f"and {33 - num_shown} more strategies, which the page and tasks.csv have" in text
    assert "strategy_29" in text
    assert "strategy_30" not in text
    row = next(line.split() for line in text.splitlines() if line.startswith("sentiment"))
    assert row[4:] == [f"{0.5 * (1.5 - place / 100):.3f}>" for place in range(num_shown)]


def test_failures_notes_and_brackets_are_printed_as_they_are(make_comparison):
    comparison = make_comparison(
        {"[red]pcgrad[/red]": {"[bold]": 0.1, ":smile:": 0.2}},
        notes=("left out: [b]: no",),
        failures={"[job]": "lr=[1, 2]: no"},
    )
    text = "\n".join(printed(comparison, 120))
    for part in (
        "[red]pcgrad[/red] ",
        "[bold] ",
        ":smile: ",
        "note: left out: [b]: no",
        "failed: [job]: lr=[1, 2]: no",
    ):
        assert part in text


def test_what_is_unknown_is_a_dash(make_comparison):
    comparison = make_comparison(CHANGES, compared=False, half_width=math.nan)
    first = replace(comparison.strategies[0], mean_rank=math.nan)
    lines = printed(replace(comparison, base=dict.fromkeys(comparison.tasks, math.nan), strategies=[first]), 120)
    assert next(line.split() for line in lines if line.startswith("pcgrad"))[:7] == [
        *("pcgrad", "0.575", "-", "0.550", "inflect", "-", "-"),
    ]
    assert next(line.split() for line in lines if line.startswith("inflect")) == ["inflect", "accuracy", "-", "0.550"]
