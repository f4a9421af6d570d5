"""Arithmetic on verdicts. The unit of every interval is the prompt, never the call.

`votes`, the input of most functions, is an integer array (n prompts, 2 orders, 3): how many verdicts on a prompt in an
order were a loss, a tie and a win of side 2, the side that is scored. The first order shows side 1 first, the second
shows side 2 first. Every prompt has at least one verdict in each order.
"""

from typing import Any

import numpy as np

from tandem.intervals import LEVEL, Array, Estimate, bootstrap, estimate, mean, wilson

MIN_PROMPTS = 20  # a cluster-robust interval from fewer clusters is too short


def order_scores(votes: Array) -> Array:
    """Mean score of side 2 by prompt and order, (n, 2): win 1, tie ½, loss 0."""
    return (votes[..., 2] + votes[..., 1] / 2) / votes.sum(-1)


def prompt_scores(votes: Array) -> Array:
    """Mean score of side 2 by prompt, over both orders, (n,)."""
    return order_scores(votes).mean(1)


def order_outcomes(votes: Array) -> Array:
    """The outcome for side 2 in each order, (n, 2): 1 won, 0 tie, −1 lost."""
    return np.sign(votes[..., 2] - votes[..., 0])


def strict_outcomes(votes: Array) -> Array:
    """The outcome for side 2 by prompt, (n,): won or lost only if both orders say so, else a tie."""
    outcomes = order_outcomes(votes)
    return np.where(outcomes[:, 0] == outcomes[:, 1], outcomes[:, 0], 0)


def mean_outcomes(votes: Array) -> Array:
    """The outcome for side 2 by prompt, (n,): won if its mean score is above ½, lost if below.

    Computed in integers, so that no rounding turns a mean of exactly ½ into something else.
    """
    lead = votes[..., 2] - votes[..., 0]
    calls = votes.sum(-1)
    return np.sign(lead[:, 0] * calls[:, 1] + lead[:, 1] * calls[:, 0])


def count(outcomes: Array) -> dict[str, Any]:
    """Wins, ties and losses, the share of wins among wins and losses, and the p of the exact two-sided sign test."""
    from scipy.stats import binomtest

    wins, ties, losses = (int((outcomes == outcome).sum()) for outcome in (1, 0, -1))
    decisive = wins + losses
    return {
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "win_rate": wilson(wins, decisive, "no prompt is decisive"),
        "sign_test_p": float(binomtest(wins, decisive).pvalue) if decisive else 1.0,
    }


def mean_score(scores: Array, seed: int) -> Estimate:
    """Mean of the prompts' scores, (n,), with its bootstrap interval."""
    if not len(scores):
        return estimate(None, None, None, 0, "no prompt was judged in both orders")
    return bootstrap(mean, [scores], seed)


def length_controlled(votes: Array, length_difference: Array) -> Estimate:
    """The share that side 2 would win if both answers were equally long.

    A binomial GLM, score ~ 1 + tanh(d / sd(d)) + order, with d the length of answer 2 minus that of answer 1 and order
    ±½; a row for each prompt and order, errors clustered by prompt. The value is the model's prediction at d = 0 and
    order 0. d is scaled but not centred, so that 0 means "equally long" (Dubois et al. 2024, Length-Controlled
    AlpacaEval, without its terms for model and instruction, which need outside data). `length_effect` is the
    coefficient of tanh, in log-odds.

    Args:
        votes: (n, 2, 3)
        length_difference: (n,)
    """
    n = len(votes)

    def none(why: str) -> Estimate:
        return estimate(None, None, None, n, why) | {"length_effect": None}

    if n < MIN_PROMPTS:
        return none(f"fewer than {MIN_PROMPTS} prompts")
    spread = length_difference.std()
    if spread == 0:
        if length_difference[0] == 0:
            return none("both answers are equally long on every prompt: there is nothing to control for")
        return none("the difference in length is the same on every prompt: it cannot be told from quality")
    length = np.tanh(length_difference / spread)
    rows = np.stack(
        [np.ones(2 * n), np.repeat(length, 2), np.tile([-0.5, 0.5], n)],
        axis=1,
    )
    score = order_scores(votes).reshape(-1)
    if np.ptp(score) == 0 or separated(rows, score):
        return none("length and order predict the verdicts perfectly: the model has no finite fit")
    import statsmodels.api as sm

    fit = sm.GLM(score, rows, family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": np.repeat(np.arange(n), 2)}
    )
    intercept, error = fit.params[0], fit.bse[0]
    if not (fit.converged and np.isfinite(error)):
        return none("the model did not converge")
    from scipy.special import expit
    from scipy.stats import norm

    reach = norm.ppf((1 + LEVEL) / 2) * error
    low, value, high = expit([intercept - reach, intercept, intercept + reach])
    return estimate(value, low, high, n) | {"length_effect": float(fit.params[1])}


def separated(rows: Array, score: Array) -> bool:
    """Whether the scores are separated: some direction of the parameters predicts them perfectly, and no fit is finite.

    By the linear program of Konis (2007, Linear programming algorithms for detecting separated data in binary logistic
    regression models). A score between 0 and 1 counts as a success and a failure at once.

    Args:
        rows: (m, k) design
        score: (m,) in [0, 1]
    """
    from scipy.optimize import linprog

    pure = (score == 0) | (score == 1)
    signed = rows[pure] * np.where(score[pure] == 1, 1.0, -1.0)[:, None]
    mixed = rows[~pure]
    # Maximise the total by which a direction, bounded, is right on the pure scores; it must be wrong on none of them,
    # and 0 on the mixed ones
    result = linprog(
        -signed.sum(0),
        A_ub=-signed if len(signed) else None,
        b_ub=np.zeros(len(signed)) if len(signed) else None,
        A_eq=mixed if len(mixed) else None,
        b_eq=np.zeros(len(mixed)) if len(mixed) else None,
        bounds=(-1, 1),
    )
    return bool(-result.fun > 1e-6 * len(rows))


def when_not_longer(votes: Array, length_difference: Array) -> dict[str, Estimate]:
    """For each side, its share of the decisive prompts on which its answer is not the longer one."""
    outcomes = strict_outcomes(votes)
    result = {}
    for side, sign in (("side_1", -1), ("side_2", 1)):
        decided = sign * outcomes[(sign * length_difference <= 0) & (outcomes != 0)]
        result[side] = wilson((decided == 1).sum(), len(decided), "no such prompt is decisive")
    return result


def first_position_rate(votes: Array) -> Estimate:
    """The share of verdicts other than ties that favour the answer shown first.

    There is no interval, since n counts verdicts, which are not independent.
    """
    first = votes[:, 0, 0].sum() + votes[:, 1, 2].sum()
    named = votes[..., 0].sum() + votes[..., 2].sum()
    if named == 0:
        return estimate(None, None, None, 0, "every verdict is a tie")
    return estimate(first / named, None, None, named)


def flip_rate(votes: Array) -> Estimate:
    """The share of prompts on which the winner changes with the order, among those where both orders name one."""
    outcomes = order_outcomes(votes)
    decided = outcomes[(outcomes != 0).all(1)]
    return wilson((decided[:, 0] != decided[:, 1]).sum(), len(decided), "no prompt has a winner in both orders")


def bounds(votes: Array, missing: int) -> dict[str, dict[str, Estimate]]:
    """The result if side 2 had lost, or won, all `missing` prompts: those without a verdict in one order or both."""
    outcomes = strict_outcomes(votes)
    wins, losses = int((outcomes == 1).sum()), int((outcomes == -1).sum())
    total, n = float(prompt_scores(votes).sum()) if len(votes) else 0.0, len(votes) + missing
    result = {}
    for name, gained in (("missing_as_losses", 0), ("missing_as_wins", missing)):
        result[name] = {
            "win_rate": wilson(wins + gained, wins + losses + missing, "no prompt is decisive"),
            "mean_score": estimate((total + gained) / n if n else None, None, None, n),
        }
    return result


def decided_by_non_answers(votes: Array, spoiled: Array) -> dict[str, Any]:
    """The decisive prompts on which the losing side gave no whole answer; `win_rate` is side 2's among them.

    Args:
        votes: (n, 2, 3)
        spoiled: bool (n, 2), whether side 1 and side 2 gave no whole answer
    """
    outcomes = strict_outcomes(votes)
    wins = int(((outcomes == 1) & spoiled[:, 0]).sum())
    losses = int(((outcomes == -1) & spoiled[:, 1]).sum())
    return {"wins": wins, "losses": losses, "win_rate": wilson(wins, wins + losses, "no prompt was lost like that")}


def summarise(
    votes: Array,
    length_difference: Array,
    identical: Array,
    missing: int,
    seed: int,
    spoiled: Array | None = None,
) -> dict[str, Any]:
    """Every statistic of one set of comparisons.

    Args:
        votes: int (n, 2, 3), prompts judged in both orders; identical answers as ties
        length_difference: (n,) characters of answer 2 minus those of answer 1
        identical: bool (n,), whether the answers are the same: the judge did not see them, so that they are left out
            of the rates that describe the judge
        missing: prompts without a verdict in one order or both
        seed: of the bootstrap
        spoiled: bool (n, 2), whether side 1 and side 2 gave no whole answer (empty, cut off). The length of such an
            answer explains nothing: both estimates about length leave the prompt out
    """
    seen = votes[~identical]
    if spoiled is None:
        spoiled = np.zeros((len(votes), 2), dtype=bool)
    whole = ~spoiled.any(1)
    return {
        "n_prompts": len(votes) + missing,
        "n_scored": len(votes),
        "n_missing": missing,
        "n_identical": int(identical.sum()),
        "mean_score": mean_score(prompt_scores(votes), seed),
        "orders_agree": count(strict_outcomes(votes)),
        "mean_of_orders": count(mean_outcomes(votes)),
        "length_controlled": length_controlled(votes[whole], length_difference[whole]),
        "when_not_longer": when_not_longer(votes[whole], length_difference[whole]),
        "whole_answers": {"n_prompts": int(whole.sum()), **count(strict_outcomes(votes[whole]))},
        "decided_by_non_answers": decided_by_non_answers(votes, spoiled),
        "first_position_rate": first_position_rate(seen),
        "order_flip_rate": flip_rate(seen),
        "bounds": bounds(votes, missing),
        "mean_length_difference": float(length_difference.mean()) if len(votes) else None,
    }
