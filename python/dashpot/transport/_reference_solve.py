"""The solvers of `regularized_ot` in PyTorch: a batch at once, every problem at its own pace.

No solver asks the host for a number on a GPU: problems that are done stand still behind a mask, and
the loops have fixed lengths. (On the CPU, where asking costs nothing, they end with the last
problem.) Functions here minimise f = minus the dual; x (B, N) is alpha, or alpha and beta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CONVERGED, MAX_ITER, STALLED, INFEASIBLE = range(4)
PAIRS = 10  # of L-BFGS, as SciPy's
WINDOW = 20  # steps over which progress is judged
CLOSED = -1e30  # potential of a row without mass under negative entropy


class Function(NamedTuple):
    """f and gradient at x, and how far x is from a solution."""

    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]  # x (B, N) -> f (B,), g (B, N)
    error: Callable[[Tensor], Tensor]  # g (B, N) -> the larger marginal error per mass (B,)
    scale: Tensor | float  # length of the first step along -g
    noise: float  # rounding of f, relative


class Progress(NamedTuple):
    x: Tensor  # (B, N)
    iterations: Tensor  # (B,) int32
    evaluations: Tensor  # (B,) int32
    status: Tensor  # (B,) int32


def may_ask(tensor: Tensor) -> bool:
    """Whether the host may look at a number of the tensor: not on a GPU, which it would wait for,
    not in a compiled graph, which it would break, not under torch.func, and not of a tensor that
    is none (FakeTensor)."""
    asked = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.device.type == "cpu" and plain and not asked


def over(done: Tensor) -> bool:
    return may_ask(done) and bool(done.all())


def adam(function: Function, x: Tensor, max_iter: int, tol: float, lr: float) -> Progress:
    """optax.adam with its constants."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    done = torch.zeros_like(x[:, 0], dtype=torch.bool)
    steps, calls = (
        torch.zeros_like(done, dtype=torch.int32),
        torch.zeros_like(done, dtype=torch.int32),
    )
    for step in range(1, max_iter + 1):
        _, g = function.evaluate(x)
        calls = calls + (~done).int()
        done = done | (function.error(g) <= tol)
        if over(done):
            break
        first = first + 0.1 * (g - first)
        second = second + 0.001 * (g * g - second)
        move = lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = torch.where(done[:, None], x, x - move)
        steps = steps + (~done).int()
    return Progress(x, steps, calls, torch.where(done, CONVERGED, MAX_ITER).int())


def sinkhorn(
    function: Function, x: Tensor, a: Tensor, gamma: float, max_iter: int, tol: float
) -> Progress:
    """alpha += gamma (log a - log T 1): the semi-dual's gradient holds T 1, so that an iteration
    reads the cost once. A row sum that underflows counts as 1e-37: the next step goes on."""
    done = torch.zeros_like(x[:, 0], dtype=torch.bool)
    steps, calls = (
        torch.zeros_like(done, dtype=torch.int32),
        torch.zeros_like(done, dtype=torch.int32),
    )
    for _ in range(max_iter):
        _, g = function.evaluate(x)  # T 1 - a
        calls = calls + (~done).int()
        done = done | (function.error(g) <= tol)
        if over(done):
            break
        moved = x + gamma * (a.log() - (g + a).clamp(min=1e-37).log())
        moved = torch.where(a > 0, moved, CLOSED)
        x = torch.where(done[:, None], x, moved)
        steps = steps + (~done).int()
    return Progress(x, steps, calls, torch.where(done, CONVERGED, MAX_ITER).int())


def _direction(g: Tensor, s: Tensor, y: Tensor, bend: Tensor, scale: Tensor) -> Tensor:
    """-H g by the two loops. g (B, N); pairs s, y (P, B, N), newest last; bend = s.y (P, B), 0 for
    a pair that is not there; scale (B,) of the first guess of H."""
    inverse = torch.where(bend > 0, 1 / bend.clamp(min=1e-300), 0)
    d, shares = -g, []
    for i in reversed(range(PAIRS)):
        shares.append((s[i] * d).sum(1) * inverse[i])
        d = d - shares[-1][:, None] * y[i]
    d = d * scale[:, None]
    for i in range(PAIRS):
        back = (y[i] * d).sum(1) * inverse[i]
        d = d + (shares[PAIRS - 1 - i] - back)[:, None] * s[i]
    return d


def lbfgs(
    function: Function, x: Tensor, max_iter: int, max_eval: int, tol: float, stall: float
) -> Progress:
    """L-BFGS; bisection for the weak Wolfe conditions, which makes progress at kinks. One pass of
    the loop is one evaluation of every problem, wherever it stands in its line search."""
    f, g = function.evaluate(x)
    batch = x.shape[0]
    s, y = x.new_zeros(PAIRS, batch, x.shape[1]), x.new_zeros(PAIRS, batch, x.shape[1])
    bend = x.new_zeros(PAIRS, batch)
    past = x.new_full((WINDOW, batch), torch.inf)
    first = function.scale * torch.ones_like(f)
    d = -first[:, None] * g
    t, low, high = torch.ones_like(f), torch.zeros_like(f), torch.full_like(f, torch.inf)
    trials = torch.zeros_like(f)
    steps = torch.zeros_like(f, dtype=torch.int32)
    calls = torch.ones_like(steps)
    status = torch.where(function.error(g) <= tol, CONVERGED, -1)
    for _ in range(max_eval - 1):
        going = status < 0
        if over(~going):
            break
        slope = (g * d).sum(1)  # (B,)
        tried = x + t[:, None] * d
        f_next, g_next = function.evaluate(tried)
        calls, trials = calls + going.int(), trials + 1
        slope_next = (g_next * d).sum(1)
        near = (f_next <= f + function.noise * f.abs()) & (slope_next <= -0.9998 * slope)
        lower = (f_next <= f + 1e-4 * t * slope) | near
        flat = slope_next >= 0.9 * slope
        given_up = (trials >= 25) | ~(slope < 0)
        step = going & ((lower & flat) | (given_up & (low > 0) & (f_next < f)))
        restart = going & given_up & ~step
        known = (bend > 0).any(0)
        status = torch.where(restart & ~known, STALLED, status)
        high = torch.where(lower, high, t)
        low = torch.where(lower, t, low)
        t = torch.where(high.isinf(), 2 * t, (low + high) / 2)

        ds, dy = tried - x, g_next - g
        turn = (ds * dy).sum(1)
        keep = step & (turn > 1e-14 * ((ds * ds).sum(1) * (dy * dy).sum(1)).sqrt())
        push = keep[None, :, None]
        s = torch.where(push, torch.cat([s[1:], ds[None]]), s)
        y = torch.where(push, torch.cat([y[1:], dy[None]]), y)
        bend = torch.where(keep, torch.cat([bend[1:], turn[None]]), bend)
        bend = torch.where(restart, 0, bend)
        x, g = torch.where(step[:, None], tried, x), torch.where(step[:, None], g_next, g)
        f = torch.where(step, f_next, f)
        steps = steps + step.int()
        stuck = past[0] - f <= stall * f.abs().clamp(min=1)
        past = torch.where(step, torch.cat([past[1:], f[None]]), past)
        status = torch.where(step & (steps >= max_iter), MAX_ITER, status)
        status = torch.where(step & stuck, STALLED, status)
        status = torch.where(step & (function.error(g) <= tol), CONVERGED, status)
        fresh = step | restart
        last = y[-1]
        scale = torch.where(bend[-1] > 0, bend[-1] / (last * last).sum(1).clamp(min=1e-300), first)
        d = torch.where(fresh[:, None], _direction(g, s, y, bend, scale), d)
        t = torch.where(fresh, 1, t)
        low, high = torch.where(fresh, 0, low), torch.where(fresh, torch.inf, high)
        trials = torch.where(fresh, 0, trials)
    return Progress(x, steps, calls, torch.where(status < 0, MAX_ITER, status).int())


# As in csrc/transport/newton.h: the error from which gamma goes on falling, the predictor's
# damping, the corrector's at the start, after a predictor, at least, and its floor; step lengths of
# a line search, steps at the last gamma in which the error falls by a tenth.
NEAR, PREDICTOR, FIRST_DAMPING, THEN_DAMPING, LEAST_DAMPING = 0.3, 5e-3, 0.1, 3e-2, 1e-2
FLOOR, TRIALS, PATIENCE = 1e-8, 12, 30


def newton(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    eliminate: Callable[[Tensor, Tensor], Tensor],
    direction: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    error: Callable[[Tensor], Tensor],
    alpha: Tensor, least: Tensor, gamma: float, wide: Tensor, noise: float, max_iter: int,
    tol: float,
) -> Progress:  # fmt: skip
    """Semismooth Newton for the l2 dual along the regulariser's strength (B,), which falls to gamma
    by halves, from `wide` (B,) where alpha (B, m) is no start to go on from. Zeros are none: then
    alpha is `least` (B, m), each row's smallest cost.

    eliminate(alpha, strength) -> x (B, m + n), with the semi-dual's beta; evaluate(x, strength) ->
    f (B,), g (B, m + n); direction(x, g, strength, next, damping) -> d (B, m + n), Newton's step at
    `next`. A step to a smaller strength is taken as it is, while the error is small; one at the
    same strength has a line search. One pass of the loop is one evaluation of every problem,
    wherever it stands. Half of tol: once columns are exact, a row's error holds theirs too.
    """
    strength = torch.full_like(wide, gamma)
    x = eliminate(alpha, strength)
    f, g = evaluate(x, strength)
    cold = (alpha == 0).all(1)
    far, alpha = (error(g) > 0.1) | cold, torch.where(cold[:, None], least, alpha)
    strength = torch.where(far, wide.clamp(min=gamma), strength)
    x = torch.where(far[:, None], eliminate(alpha, strength), x)
    f, g = evaluate(x, strength)

    d, t, trials = torch.zeros_like(x), torch.ones_like(f), torch.zeros_like(f)
    damping, slope = torch.full_like(f, FIRST_DAMPING), torch.zeros_like(f)
    turn = torch.ones_like(f, dtype=torch.bool)  # a new direction is wanted
    stuck, ahead = ~turn, ~turn
    least, idle = torch.full_like(f, torch.inf), torch.zeros_like(f)
    steps = torch.zeros_like(f, dtype=torch.int32)
    calls, status = steps + 4, steps - 1
    for _ in range(4 * max_iter + 60):
        here = error(g)
        last = strength <= gamma
        status = torch.where(turn & (status < 0) & (steps >= max_iter), MAX_ITER, status)
        status = torch.where(turn & last & (here <= tol / 2), CONVERGED, status)
        fresh = turn & (~last | (here < 0.9 * least))
        idle = torch.where(fresh, 0, idle + turn)
        least = torch.where(fresh, here, least)
        status = torch.where(turn & (status < 0) & (idle >= PATIENCE), STALLED, status)
        going = status < 0
        if over(~going):
            break
        turn = turn & going
        if not may_ask(turn) or bool(turn.any()):
            steps = steps + turn.int()
            ahead = torch.where(turn, ~last & ((here <= NEAR) | stuck), ahead)
            onward = turn & ahead
            aim = torch.where(onward, (strength / 2).clamp(min=gamma), strength)
            delta = torch.where(onward, PREDICTOR, damping * here.clamp(max=1) + FLOOR)
            d = torch.where(turn[:, None], direction(x, g, strength, aim, delta), d)
            strength, slope = aim, torch.where(turn, (g * d).sum(1), slope)
            t, trials = torch.where(turn, 1, t), torch.where(turn, 0, trials)
            calls = calls + turn.int()
        tried = x + t[:, None] * d
        f_next, g_next = evaluate(tried, strength)
        there = error(g_next)
        calls = calls + going.int()
        fine = (f_next <= f + 1e-4 * t * slope) | (there < 0.9 * here) | ahead
        fine = fine | ((f_next <= f + noise * f.abs()) & (there < here))
        take = going & fine
        x, g = torch.where(take[:, None], tried, x), torch.where(take[:, None], g_next, g)
        f = torch.where(take, f_next, f)
        grown = torch.where(trials == 0, 0.25, torch.where(trials < 3, 4**trials, 64.0))
        grown = (damping * grown).clamp(LEAST_DAMPING, 1e3)
        damping = torch.where(take, torch.where(ahead, THEN_DAMPING, grown), damping)
        failed = going & ~take & (trials >= TRIALS - 1)
        status = torch.where(failed & last, STALLED, status)
        stuck = failed
        turn = take | failed
        t, trials = t / 4, trials + 1
    return Progress(x, steps, calls, torch.where(status < 0, MAX_ITER, status).int())


def smoothed_dual(s: Tensor, gamma: float, k: int, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Omega+ (B, n), T (B, m, n) and level (B, n) of max {sum theta h - mu/2 theta^2 : 0 <= theta
    <= 1, sum theta <= k}, h = [s]+^2 / (2 gamma): theta = clip((h - level) / mu, 0, 1), T = theta
    [s]+ / gamma. mu (B, 1, 1)."""
    positive = s.clamp(min=0)
    h = positive.square() / (2 * gamma)  # (B, m, n)
    low, high = torch.zeros_like(h[:, 0]), h.amax(1)  # (B, n)
    active = (h / mu).clamp(max=1).sum(1) > k
    for _ in range(60):
        middle = (low + high) / 2
        over = ((h - middle[:, None]) / mu).clamp(0, 1).sum(1) > k
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    level = torch.where(active, (low + high) / 2, 0)
    theta = ((h - level[:, None]) / mu).clamp(0, 1)
    return (theta * (h - mu / 2 * theta)).sum(1), theta * positive / gamma, level
