"""Intervals against closed forms, a reference library and simulation: they hold the truth as often as they say."""
import math

import numpy as np
import pytest
from scipy import stats

from scilm_adapt.errors import InputError
from scilm_adapt.intervals import (
    _resampled_ratios,
    _verdict,
    claim,
    cost_of,
    difference_interval,
    documents_needed,
    holm,
    judged,
    rate_difference_interval,
    rate_interval,
    ratio_interval,
    seeds_interval,
    seeds_p_value,
    signed,
    told,
    told_cost,
)


def documents(seed: int, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    "Sizes with a long tail and nats that scatter by document; the true ratio is 1.2."
    draw = np.random.default_rng(seed)
    sizes = draw.lognormal(6, 0.5, size)
    return sizes*draw.gamma(40, 1.2/40, size), sizes


def test_bootstrap_intervals_cover_the_truth_in_95_of_100_cases():
    found = [ratio_interval(*documents(seed), resamples=400) for seed in range(1000)]
    covered = np.mean([interval['low'] <= 1.2 <= interval['high'] for interval in found])
    assert 0.93 <= covered <= 0.97
    assert all(interval['low'] <= interval['value'] <= interval['high'] for interval in found)


def test_bootstrap_agrees_with_scipy():
    nats, sizes = documents(3)
    theirs = stats.bootstrap((nats, sizes), lambda a, b, axis: a.sum(axis)/b.sum(axis), paired=True, method='percentile', vectorized=True,
                             n_resamples=8000, rng=np.random.default_rng(0)).confidence_interval
    ours = ratio_interval(nats, sizes, resamples=8000)
    width = theirs.high - theirs.low
    assert abs(ours['low'] - theirs.low) < 0.08*width and abs(ours['high'] - theirs.high) < 0.08*width


def test_bootstrap_is_a_function_of_its_seed_and_draws_in_blocks():
    nats, sizes = documents(0, 5000)
    assert ratio_interval(nats, sizes, seed=1) == ratio_interval(nats, sizes, seed=1) != ratio_interval(nats, sizes, seed=2)
    assert len(_resampled_ratios(nats, sizes, resamples=2001)) == 2001
    assert ratio_interval([3.0], [2.0]) == dict(value=1.5, low=1.5, high=1.5)


def test_paired_difference_sees_what_two_intervals_do_not():
    nats, sizes = documents(0)
    other = nats - 0.02*sizes*np.random.default_rng(1).gamma(4, 1/4, len(sizes))
    assert ratio_interval(nats, sizes)['low'] < ratio_interval(other, sizes)['high']
    difference = difference_interval(other, nats, sizes)
    assert difference['high'] < 0
    assert difference['value'] == pytest.approx((other.sum() - nats.sum())/sizes.sum())


def test_a_difference_is_rarely_found_where_there_is_none():
    "Two models that scatter around the same truth: about one verdict in twenty may be wrong."
    wrong = 0
    for seed in range(400):
        (one, sizes), draw = documents(seed), np.random.default_rng(seed + 9999)
        other = one + sizes*draw.normal(0, 0.1, len(sizes))
        wrong += _verdict(difference_interval(other, one, sizes, resamples=300)) != 'open'
    assert 0.02 <= wrong/400 <= 0.09


def test_wilson_interval_is_the_textbook_formula():
    z = stats.norm.ppf(0.975)
    for happened, total in ((0, 50), (50, 50), (81, 263), (1, 3)):
        p = happened/total
        centre, spread = p + z*z/(2*total), z*math.sqrt(p*(1 - p)/total + z*z/(4*total*total))
        found = rate_interval(np.arange(total) < happened)
        assert found['value'] == pytest.approx(p)
        assert found['low'] == pytest.approx((centre - spread)/(1 + z*z/total), abs=1e-12)
        assert found['high'] == pytest.approx((centre + spread)/(1 + z*z/total), abs=1e-12)


def test_paired_share_intervals_cover_the_truth():
    draw, hits = np.random.default_rng(0), []
    for _ in range(1000):
        hard = draw.random(150) < 0.3
        one, other = draw.random(150) < np.where(hard, 0.2, 0.95), draw.random(150) < np.where(hard, 0.1, 0.8)
        found = rate_difference_interval(one, other)
        hits.append(found['low'] <= 0.3*0.1 + 0.7*0.15 <= found['high'])
    assert 0.93 <= np.mean(hits) <= 0.98


def test_paired_share_interval_by_hand():
    "36 both, 12 only the first, 2 only the second, 0 neither: method 10 computed step by step."
    one, other = np.array([1]*48 + [0]*2), np.array([1]*36 + [0]*12 + [1]*2)
    a, b = rate_interval(one), rate_interval(other)
    phi = (36*0 - 12*2)/math.sqrt(48*2*38*12)
    d, e = a['value'] - a['low'], b['high'] - b['value']
    found = rate_difference_interval(one, other)
    assert found['value'] == pytest.approx(0.2)
    assert found['low'] == pytest.approx(0.2 - math.sqrt(d*d - 2*phi*d*e + e*e))
    assert found['low'] < 0.2 < found['high']


# --- several seeds

def trained(draw: np.random.Generator, spread: float, seeds: int = 3, size: int = 150) -> tuple[np.ndarray, np.ndarray]:
    "Differences [seeds, documents] around a true 0.05, where seeds differ by `spread`, and the sizes of the documents."
    sizes = draw.lognormal(6, 0.6, size)
    return sizes*(draw.normal(0.05, spread, (seeds, 1)) + draw.normal(0, 0.2, size) + draw.normal(0, 0.1, (seeds, size))), sizes


@pytest.mark.parametrize('spread', [0, 0.02, 0.1])
def test_intervals_over_seeds_cover_the_truth_whatever_part_the_seeds_have(spread):
    draw = np.random.default_rng(0)
    found = [seeds_interval(*trained(draw, spread)) for _ in range(1000)]
    assert 0.94 <= np.mean([interval['low'] <= 0.05 <= interval['high'] for interval in found]) <= 0.99


def test_an_interval_over_seeds_is_students_where_documents_leave_no_doubt():
    sizes, values = np.full(400, 10.0), np.array([0.1, 0.3, 0.2])
    found = seeds_interval(values[:, None]*sizes, sizes)
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=values.std(ddof=1)/math.sqrt(3))
    assert found == pytest.approx(dict(value=0.2, low=low, high=high))


def test_an_interval_over_equal_seeds_is_that_over_documents():
    nats, sizes = documents(1)
    found, alone = seeds_interval(np.stack([nats, nats]), sizes), ratio_interval(nats, sizes, resamples=8000)
    assert found['value'] == pytest.approx(alone['value'])
    assert found['high'] - found['low'] == pytest.approx(alone['high'] - alone['low'], rel=0.05)


def test_one_seed_gives_no_interval_over_seeds():
    with pytest.raises(InputError, match='One seed says nothing'): seeds_interval(np.ones((1, 5)), np.ones(5))


def test_verdicts_are_open_where_zero_is_possible():
    assert _verdict(dict(low=0.1, high=0.2)) == 'worse' and _verdict(dict(low=0.1, high=0.2), lower_is_better=False) == 'better'
    assert _verdict(dict(low=-1, high=0)) == 'open'


# --- several questions at once

def invented(seed: int, effect: float, papers: int = 60, spread: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    "Differences [3, papers] around `effect` per byte, seeds that differ by `spread`, and sizes."
    draw = np.random.default_rng(seed)
    sizes = draw.lognormal(6, 0.5, papers)
    return (effect + draw.normal(0, spread, (3, 1)) + draw.normal(0, 0.1, papers) + draw.normal(0, 0.05, (3, papers)))*sizes, sizes


@pytest.mark.parametrize('seed', range(20))
def test_a_p_value_below_5_percent_is_an_interval_without_zero(seed):
    numerator, sizes = invented(seed, 0.04)
    interval, p_value = seeds_interval(numerator, sizes), seeds_p_value(numerator, sizes)
    assert (p_value < 0.05) == (interval['low'] > 0 or interval['high'] < 0) and 0 < p_value <= 1
    assert seeds_p_value(-numerator, sizes) == pytest.approx(p_value)
    assert seeds_p_value(numerator + 0.5*np.sign(numerator.sum())*sizes, sizes) < p_value


def test_p_values_of_the_ends():
    same = np.zeros((3, 9)), np.ones(9)
    assert seeds_p_value(*same) == 1 and seeds_p_value(np.ones((3, 9)), np.ones(9)) == 1e-12
    with pytest.raises(InputError, match='One seed'): seeds_p_value(np.ones((1, 9)), np.ones(9))


def test_without_a_spread_of_seeds_the_p_value_is_that_of_a_t_test():
    draw = np.random.default_rng(0)
    values = draw.normal(0.1, 1, 40)
    assert seeds_p_value(np.stack([values]*3), np.ones(40)) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


def stepwise(p_values: dict[str, float], risk: float) -> set[str]:
    "What Holm's procedure rejects at this risk, step by step as he wrote it."
    rejected, order = set(), sorted(p_values, key=p_values.get)
    for number, name in enumerate(order):
        if p_values[name] > risk/(len(order) - number): break
        rejected.add(name)
    return rejected


@pytest.mark.parametrize('seed', range(30))
def test_holm_is_the_stepwise_procedure_at_every_risk(seed):
    draw = np.random.default_rng(seed)
    p_values = {f'claim {n}': float(p) for n, p in enumerate(draw.random(draw.integers(1, 7))**3)}
    corrected = holm(p_values)
    assert [*corrected] == [*p_values] and all(corrected[name] >= p_values[name] for name in p_values)
    for risk in (0.01, 0.05, 0.3):
        assert {name for name, p in corrected.items() if p <= risk} == stepwise(p_values, risk)
    assert holm({}) == {}


def test_of_so_many_documents_the_same_mean_is_just_shown():
    "The same documents several times over: the mean stays, and only the part of the interval for other documents shrinks."
    tried = (invented(seed, 0.02, papers=40, spread=0.0005) for seed in range(99))
    numerator, sizes = next(one for one in tried if (documents_needed(*one) or 0) > 400)
    needed = documents_needed(numerator, sizes)
    for share, shown in ((0.85, False), (1.15, True)):
        times = round(share*needed/40)
        found = seeds_interval(np.tile(numerator, times), np.tile(sizes, times))
        assert (not found['low'] <= 0 <= found['high']) == shown
    lucky, ones = np.array([[0.5]*9, [-0.4]*9, [0.1]*9]) + 0.01*np.arange(9), np.ones(9)
    assert documents_needed(lucky, ones) is None and documents_needed(0*lucky, ones) is None
    assert documents_needed(np.ones((3, 9)), ones) == 2


# --- claims and their controls ------------------------------------------------------------------------------------------------------

def arms(**gains: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    "Numerators [3 seeds, 200 documents] of arms that gain so much of the same reading, each with a little chance of its own, and sizes."
    draw = np.random.default_rng(7)
    reading = np.full((3, 200), 400.0) + draw.normal(0, 40, 200)
    return {name: reading - gain*300 + draw.normal(0, 3, (3, 200)) for name, gain in gains.items()}, np.full(200, 300.0)


def test_a_claim_has_to_beat_every_control_and_its_p_value_is_the_largest():
    of, sizes = arms(mine=0.05, reading=0.0, shuffled=0.04, better=0.06)
    both = claim(of['mine'], dict(reading=of['reading'], shuffled=of['shuffled']), sizes)
    parts = {name: of['mine'] - of[name] for name in ('reading', 'shuffled')}
    assert both['differences'] == {name: seeds_interval(apart, sizes) for name, apart in parts.items()}
    assert both['p_value'] == max(seeds_p_value(apart, sizes) for apart in parts.values()) < 0.05
    assert both['needed'] == max(documents_needed(apart, sizes) for apart in parts.values())
    lost = claim(of['mine'], dict(reading=of['reading'], better=of['better']), sizes)
    assert lost['p_value'] == 1 and lost['needed'] is None and lost['differences']['better']['value'] > 0


def test_claims_are_judged_together_and_by_their_price():
    claims = {name: dict(differences={}, p_value=risk, needed=9) for name, risk in dict(a=0.001, b=0.02, c=0.03, d=0.9).items()}
    dear, cheap = (dict(value=high/2, low=0.0, high=high) for high in (0.0031, 0.003))
    found = judged(claims, dict(a=dear, b=cheap, d=dear))
    assert {name: about['holm'] for name, about in found.items()} == holm({name: about['p_value'] for name, about in claims.items()})
    assert [about['verdict'] for about in found.values()] == ['shown, but it costs too much', 'not shown', 'not shown', 'not shown']
    assert {name: about.get('cost') for name, about in found.items()} == dict(a=dear, b=cheap, c=None, d=dear)
    for costs in (None, dict(b=cheap)):
        assert judged({'b': claims['b']}, costs)['b']['verdict'] == 'shown', 'alone it would have been'
    assert judged({'b': claims['b']}, dict(b=cheap), allowed=0.002)['b']['verdict'] == 'shown, but it costs too much'
    assert judged({'b': claims['b']}, dict(b=dict(high=float('nan'))))['b']['verdict'] == 'shown, but it costs too much'
    assert 'holm' not in claims['a'] and judged({}) == {}


def test_a_cost_is_a_share_of_what_it_is_held_against():
    of, sizes = arms(mine=-0.02, reading=0.0)
    found, level = cost_of(of['mine'], of['reading'], sizes), np.mean([row.sum()/sizes.sum() for row in of['reading']])
    absolute = seeds_interval(of['mine'] - of['reading'], sizes)
    assert found == pytest.approx({key: value/level for key, value in absolute.items()})
    assert found['value'] == pytest.approx(0.02/level, rel=0.15)
    assert told_cost(dict(value=0.00396, high=0.00823)) == '+0.40 %, up to +0.82 %'
    assert told_cost(dict(value=-0.001, high=0.0)) == '−0.10 %, up to 0.00 %'


@pytest.mark.parametrize('about, words', [
    (dict(differences=dict(reading=dict(value=-0.02, low=-0.03, high=-0.01)), holm=0.0123, verdict='shown'),
     '−0.020 [−0.030, −0.010] bits against reading: shown (p = 0.012).'),
    (dict(differences=dict(a=dict(value=-0.02, low=-0.03, high=-0.01), b=dict(value=0.02, low=0.01, high=0.03)), verdict='not shown'),
     '−0.020 [−0.030, −0.010] bits against a; +0.020 [+0.010, +0.030] against b: not shown; it is worse than b.'),
    (dict(differences=dict(a=dict(value=0.0, low=-0.03, high=0.03)), verdict='not shown'),
     'against a the difference points the other way.'),
    (dict(differences=dict(a=dict(value=-0.01, low=-0.03, high=0.01)), needed=1234, verdict='not shown'),
     'it would have taken 1,234 papers.'),
    (dict(differences=dict(a=dict(value=-0.01, low=-0.03, high=0.01)), needed=None, verdict='not shown'),
     'no number of papers would do.')])
def test_what_is_told_of_a_claim_follows_from_its_numbers(about, words):
    text = told('x', about, 'bits')
    assert text.startswith('x: ') and text.endswith(words)


def test_signs_are_typographic_and_zero_has_none():
    assert [signed(value) for value in (0.0, -0.00049, 0.1, -0.0312)] == ['0.000', '0.000', '+0.100', '−0.031']
