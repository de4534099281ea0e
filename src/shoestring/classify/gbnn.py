r"""Sequential Training of Neural Networks with Gradient Boosting (GBNN).

Emami, Martínez-Muñoz. IEEE Access 11, 2023, arXiv 1909.12098.

Idea
----
A network with one hidden layer is grown by boosting, J units a step, and comes out as one ordinary network: the sum of
small networks is a network. Units come in order of use, so the last ones can be switched off at test time.

Equations
---------
Rows x_i, targets y_i, a score F (one number a row; K of them for K > 2 classes)::

    F_0 = argmin_c sum_i L(y_i, c)                         constant
    r   = -dL/dF                                           pseudo-residuals at F_{t-1}
    h_t(x) = act(x W_t + b_t) V_t + c_t                    fitted to r by squared error on a fresh subsample of the rows
    F_t = F_{t-1} + eta rho_t h_t

    squared error  L = (y - F)^2 / 2        r = y - F                  rho = 1
    two classes    L = log(1 + e^{-2yF})    r = 2y / (1 + e^{2yF})     rho = sum r h / sum h^2 |r| (2 - |r|)
    K > 2          L = -log softmax(F)_y    r = Y - softmax(F)         rho = sum r h / sum h^2 p (1 - p)

with y in {-1, 1} in the second line. The network (`merge`) has hidden weights [W_1 ... W_T], biases [b_1 ... b_T],
output weights [eta rho_1 V_1; ...; eta rho_T V_T] and output bias F_0 + sum_t eta rho_t c_t, so the first t blocks are
the model after t steps, with its own output bias. For two classes all outputs are doubled: p = sigmoid(2F).

Code and paper
--------------
Read: the official package `gbnn` (GAA-UAM); of the paper, the abstract; its tables were not seen.

* F_0 of K > 2 classes is zero in the official code; ``init="prior"`` takes the minimiser, the log of the class shares.
* The official rho of K > 2 classes takes the diagonal of the second derivative, too large a curvature; it is the
  default here. ``line_search="exact"`` finds the minimum of the loss along h, of squared error too, where the official
  code has rho = 1 although h was fitted to a part of the rows.
* The official code draws its subsamples without a seed, so that no two fits are equal; here ``random_state`` decides.
* A step is a fit by L-BFGS of all weights of its units, in the official code by `MLPRegressor`. ``solver="lbfgs"`` is
  the same to rounding for one output. For K outputs scikit-learn (1.9) gives L-BFGS the mean over the outputs as the
  value but the slope of the sum; here both are of the sum. ``solver="projected"`` is ours: given W and b the best V and
  c are a ridge regression, so L-BFGS searches over W and b alone (variable projection, Golub & Pereyra 1973).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from shoestring.classify._fit import all_or_nothing

__all__ = [
    "Block",
    "GBNNClassifier",
    "GBNNRegressor",
    "block_output",
    "boost_head",
    "exact_step",
    "fit_block",
    "initial_score",
    "loss",
    "merge",
    "newton_step",
    "pseudo_residuals",
]

Model = TypeVar("Model", bound="_GBNN")
LOSSES = ("squared", "binary", "softmax")
MODULES = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class Block(NamedTuple):
    """The J units of one step: hidden weights W (p, J), biases b (J,), output weights V (J, K), biases c (K,)."""

    W: np.ndarray
    b: np.ndarray
    V: np.ndarray
    c: np.ndarray


# ---- the maths


def initial_score(Y: np.ndarray, kind: str, init: str = "zero") -> np.ndarray:
    """F_0, the constant that boosting starts from.

    Parameters
    ----------
    Y : ndarray of shape (n, K)
        Targets for ``"squared"``, -1 or 1 with K = 1 for ``"binary"``, one-hot rows for ``"softmax"``.
    kind : {"squared", "binary", "softmax"}
    init : {"zero", "prior"}
        For ``"softmax"`` only: zeros, as the official code, or the log of the class shares.

    Returns
    -------
    ndarray of shape (K,)

    Examples
    --------
    >>> initial_score(np.array([[1.0], [3.0]]), "squared")
    array([2.])
    """
    mean = Y.mean(axis=0)
    if kind == "squared":
        return mean
    if kind == "binary":
        limit = 1 - 1e-12  # one class alone would send the score to infinity
        return np.arctanh(np.clip(mean, -limit, limit))  # 0.5 log((1 + m) / (1 - m))
    return np.zeros_like(mean) if init == "zero" else np.log(np.maximum(mean, 1e-12))


def loss(Y: np.ndarray, F: np.ndarray, kind: str) -> float:
    """Mean loss over rows; Y, F of shape (n, K), see `initial_score`.

    Examples
    --------
    >>> loss(np.array([[1.0], [-1.0]]), np.zeros((2, 1)), "binary").__round__(4)
    0.6931
    """
    if kind == "squared":
        return float(np.square(Y - F).sum() / (2 * len(Y)))
    if kind == "binary":
        return float(np.logaddexp(0.0, -2.0 * Y * F).mean())
    return float(-(Y * log_softmax(F, axis=1)).sum() / len(Y))


def pseudo_residuals(Y: np.ndarray, F: np.ndarray, kind: str) -> np.ndarray:
    """r = -dL/dF, of shape (n, K); Y, F of shape (n, K), see `initial_score`.

    Examples
    --------
    >>> pseudo_residuals(np.array([[1.0], [-1.0]]), np.zeros((2, 1)), "binary").ravel()
    array([ 1., -1.])
    """
    if kind == "squared":
        return Y - F
    if kind == "binary":
        return 2.0 * Y * expit(-2.0 * Y * F)
    return Y - softmax(F, axis=1)


def newton_step(h: np.ndarray, R: np.ndarray, Y: np.ndarray, kind: str) -> float:
    """The published rho: one Newton step along h, with the diagonal of the curvature; 1 for squared error.

    Parameters
    ----------
    h, R, Y : ndarray of shape (n, K)
        Outputs of the new block, pseudo-residuals and targets on all training rows.
    kind : {"squared", "binary", "softmax"}

    Returns
    -------
    float
        0 where the curvature vanishes, since the loss is then flat along h as far as can be told.

    Examples
    --------
    >>> h, y = np.array([[1.0], [1.0]]), np.array([[1.0], [1.0]])
    >>> newton_step(h, pseudo_residuals(y, np.zeros((2, 1)), "binary"), y, "binary")
    1.0
    """
    if kind == "squared":
        return 1.0
    curvature = np.abs(R) * (2.0 - np.abs(R)) if kind == "binary" else (Y - R) * (1.0 - (Y - R))
    below = float((h * h * curvature).sum())
    # Saturated rows have no curvature left: what is divided by is then rounding error.
    return float((R * h).sum()) / below if below > 1e-10 * float((h * h).sum()) else 0.0


def exact_step(h: np.ndarray, F: np.ndarray, Y: np.ndarray, kind: str, rounds: int = 20) -> float:
    """rho that minimises the loss of F + rho h, a convex function of one number; arguments as `newton_step`.

    Newton's method with the full curvature, halved where a step would not lower the loss.

    Examples
    --------
    >>> h = np.array([[1.0], [2.0]])
    >>> round(exact_step(h, np.zeros((2, 1)), 3 * h, "squared"), 12)
    3.0
    """
    rho, best = 0.0, loss(Y, F, kind)
    for _ in range(rounds):
        G = F + rho * h
        slope = float((pseudo_residuals(Y, G, kind) * h).sum())
        if kind == "squared":
            curvature = float((h * h).sum())
        elif kind == "binary":
            p = expit(2.0 * G)
            curvature = float((h * h * 4.0 * p * (1.0 - p)).sum())
        else:
            p = softmax(G, axis=1)
            curvature = float(((h * h * p).sum(axis=1) - (h * p).sum(axis=1) ** 2).sum())
        if curvature <= 1e-10 * float((h * h).sum()):
            break
        step = slope / curvature
        while abs(step) > 1e-9 * max(1.0, abs(rho)):
            lower = loss(Y, F + (rho + step) * h, kind)
            if lower <= best:
                break
            step /= 2.0
        else:
            break
        rho, best = rho + step, lower
    return rho


def block_output(X: np.ndarray, block: Block, activation: str = "logistic") -> np.ndarray:
    """h(x) = act(x W + b) V + c, of shape (n, K), for rows X (n, p)."""
    return _activate(X @ block.W + block.b, activation) @ block.V + block.c


def fit_block(
    X: np.ndarray,
    R: np.ndarray,
    n_units: int,
    random_state: np.random.RandomState,
    *,
    activation: str = "logistic",
    alpha: float = 1e-4,
    max_iter: int = 200,
    tol: float = 0.0,
    solver: str = "lbfgs",
) -> Block:
    """Fit J units to the residuals: min (||act(X W + b) V + c - R||^2 + alpha (||W||^2 + ||V||^2)) / (2 n).

    About 6 n (p + K) J flops an iteration.

    Parameters
    ----------
    X : ndarray of shape (n, p), float64
    R : ndarray of shape (n, K), float64
    n_units : J
    random_state : draws the start, uniform as Glorot & Bengio (2010) have it and `MLPRegressor` draws it
    activation : {"logistic", "tanh", "relu"}
    alpha, max_iter, tol : L2 penalty; iterations at most; largest component of the gradient at which it may stop.
        It also stops where an iteration lowers the value by less than 2.2e-9 of it, scipy's default and so
        `MLPRegressor`'s.
    solver : {"lbfgs", "projected"}
        L-BFGS over W, b, V and c, or over W and b with the best V and c for each.

    Returns
    -------
    Block

    Examples
    --------
    >>> X = np.linspace(-2.0, 2.0, 50)[:, None]
    >>> block = fit_block(X, np.tanh(X), 1, np.random.RandomState(0), solver="projected", alpha=0.0)
    >>> bool(np.abs(block_output(X, block) - np.tanh(X)).max() < 1e-3)  # 2 logistic(2x) - 1 = tanh(x)
    True
    """
    (n, p), K = X.shape, R.shape[1]
    gain = 2.0 if activation == "logistic" else 6.0
    hidden, out = np.sqrt(gain / (p + n_units)), np.sqrt(gain / (n_units + K))
    start = random_state.uniform(-hidden, hidden, (p + 1) * n_units)
    if solver == "lbfgs":
        start = np.concatenate([start, random_state.uniform(-out, out, (n_units + 1) * K)])
    mean = R.mean(axis=0)
    centred, size = R - mean, float(np.square(R - mean).sum())
    ones, cut = np.ones(n), (p + 1) * n_units
    found: dict[str, Block] = {}

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        W, b = w[: p * n_units].reshape(p, n_units), w[p * n_units : cut]
        H = _activate(X @ W + b, activation)
        slope = np.empty_like(w)
        if solver == "lbfgs":
            V, c = w[cut:-K].reshape(n_units, K), w[-K:]
            E = H @ V + c - R
            value = np.vdot(E, E) + alpha * (np.vdot(W, W) + np.vdot(V, V))
            D = (E @ V.T) * _slope(H, activation)
            slope[cut:-K], slope[-K:] = (H.T @ E + alpha * V).ravel(), ones @ E
        else:
            centre = ones @ H / n
            G = H - centre
            A, B = G.T @ G, G.T @ centred
            A.flat[:: n_units + 1] += alpha + 1e-12 * n  # two equal units, or one that is constant, stay solvable
            V = np.linalg.solve(A, B)
            c = mean - centre @ V
            # ||G V - R||^2 + alpha ||V||^2 where V is the best one. Its change, and that of c, add nothing to the
            # slope (Golub & Pereyra 1973).
            value = size - np.vdot(B, V) + alpha * np.vdot(W, W)
            D = (G @ (V @ V.T) - centred @ V.T) * _slope(H, activation)
        slope[: p * n_units], slope[p * n_units : cut] = (X.T @ D + alpha * W).ravel(), ones @ D
        found["block"] = Block(W, b, V, c)
        return value / (2 * n), slope / n

    options = {"maxiter": max_iter, "maxfun": 2 * max_iter + 20, "gtol": tol}
    found_at: Any = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)  # type: ignore[call-overload]
    objective(found_at.x)
    return Block(*(part.copy() for part in found["block"]))


def merge(F_0: np.ndarray, blocks: Sequence[Block], steps: Sequence[float]) -> Block:
    """One network of all units: ``block_output(X, merge(...)) == F_0 + sum_t steps[t] * block_output(X, blocks[t])``.

    Examples
    --------
    >>> one = Block(np.ones((1, 1)), np.zeros(1), np.ones((1, 1)), np.ones(1))
    >>> merge(np.array([5.0]), [one, one], [1.0, 2.0])
    Block(W=array([[1., 1.]]), b=array([0., 0.]), V=array([[1.],
           [2.]]), c=array([8.]))
    """
    W = np.hstack([block.W for block in blocks])
    b = np.concatenate([block.b for block in blocks])
    V = np.vstack([step * block.V for block, step in zip(blocks, steps, strict=True)])
    return Block(W, b, V, F_0 + sum(step * block.c for block, step in zip(blocks, steps, strict=True)))


def _activate(Z: np.ndarray, activation: str) -> np.ndarray:
    if activation == "logistic":
        return expit(Z, out=Z)
    return np.tanh(Z, out=Z) if activation == "tanh" else np.maximum(Z, 0.0, out=Z)


def _slope(H: np.ndarray, activation: str) -> np.ndarray:
    """Derivative of the activation, from its value."""
    if activation == "logistic":
        return H * (1.0 - H)
    return 1.0 - H * H if activation == "tanh" else (H > 0.0).astype(H.dtype)


# ---- the estimators


class _GBNN(BaseEstimator):
    """What both estimators are: T blocks, their steps, and one network made of them."""

    _kind: str
    _activation: str

    def __init__(
        self,
        n_estimators: int = 200,
        units_per_step: int = 1,
        learning_rate: float = 1.0,
        subsample: float = 0.5,
        activation: str = "logistic",
        alpha: float = 1e-4,
        max_iter: int = 200,
        tol: float = 0.0,
        solver: str = "lbfgs",
        init: str = "zero",
        line_search: str | None = "newton",
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_estimators = n_estimators
        self.units_per_step = units_per_step
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.activation = activation
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.solver = solver
        self.init = init
        self.line_search = line_search
        self.warm_start = warm_start
        self.random_state = random_state

    def _boost(self: Model, X: np.ndarray, Y: np.ndarray, kind: str) -> Model:
        """Grow the blocks on rows X (n, p) and targets Y (n, K)."""
        goes_on = self.warm_start and hasattr(self, "blocks_")
        blocks: list[Block] = list(self.blocks_) if goes_on else []
        steps: list[float] = list(self.steps_) if goes_on else []
        scores: list[float] = list(self.train_score_) if goes_on else []
        if len(blocks) > self.n_estimators:
            raise ValueError(
                f"n_estimators must be at least the {len(blocks)} steps there are with warm_start, "
                f"got {self.n_estimators}; use truncate to have fewer"
            )
        if goes_on and (
            self.init_.shape != Y.shape[1:]
            or blocks[0].b.size != self.units_per_step
            or self._activation != self.activation
        ):
            raise ValueError("y, units_per_step and activation must be as in the fit before, with warm_start")
        F_0 = self.init_ if goes_on else initial_score(Y, kind, self.init)
        rows_a_step = max(1, int(self.subsample * len(X)))
        # A seed for every step, so that steps added later are those of one longer fit.
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=self.n_estimators)
        with threadpool_limits(1):  # thousands of small products: waking a second thread costs more than it does
            F = np.broadcast_to(F_0, Y.shape)
            for step, block in zip(steps, blocks, strict=True):
                F = F + step * block_output(X, block, self.activation)
            for seed in seeds[len(blocks) :]:
                R = pseudo_residuals(Y, F, kind)
                drawn = np.random.RandomState(seed)
                rows = np.sort(drawn.permutation(len(X))[:rows_a_step]) if rows_a_step < len(X) else slice(None)
                block = fit_block(
                    np.asfortranarray(X[rows]),
                    R[rows],
                    self.units_per_step,
                    drawn,
                    activation=self.activation,
                    alpha=self.alpha,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    solver=self.solver,
                )
                h = block_output(X, block, self.activation)
                if self.line_search == "exact":
                    rho = exact_step(h, F, Y, kind)
                else:
                    rho = 1.0 if self.line_search is None else newton_step(h, R, Y, kind)
                steps.append(self.learning_rate * rho)
                blocks.append(block)
                F = F + steps[-1] * h
                scores.append(loss(Y, F, kind))
        self._activation = self.activation  # of these blocks, whatever set_params does later
        self._set(F_0, blocks, steps, scores)
        return self

    def _set(self, F_0: np.ndarray, blocks: list[Block], steps: list[float], scores: list[float]) -> None:
        self.init_, self.blocks_, self.steps_ = F_0, blocks, np.array(steps)
        self.train_score_ = np.array(scores)
        self.n_iter_ = len(blocks)
        W, b, V, c = merge(F_0, blocks, steps)
        scale = 2.0 if self._kind == "binary" else 1.0
        self.coefs_, self.intercepts_ = [W, scale * V], [b, scale * c]

    def _network(self) -> Block:
        return Block(self.coefs_[0], self.intercepts_[0], self.coefs_[1], self.intercepts_[1])

    def _output(self, X: ArrayLike) -> np.ndarray:
        """(n, K), by the one network."""
        check_is_fitted(self)
        rows: Any = validate_data(self, X, reset=False, dtype=np.float64)
        return block_output(rows, self._network(), self._activation)

    def _staged_output(self, X: ArrayLike) -> Iterator[np.ndarray]:
        check_is_fitted(self)
        rows: Any = validate_data(self, X, reset=False, dtype=np.float64)
        scale = 2.0 if self._kind == "binary" else 1.0
        F = np.tile(self.init_, (len(rows), 1))
        for step, block in zip(self.steps_, self.blocks_, strict=True):
            F = F + step * block_output(rows, block, self._activation)
            yield scale * F

    def truncate(self: Model, n_units: int) -> Model:
        """The same model with its first units alone: no fit, no data.

        Parameters
        ----------
        n_units : int
            A multiple of J, the units of a step, from J to all there are. The constant model of no unit at all is
            `init_`.

        Returns
        -------
        A fitted estimator of the same kind; this one stays as it is.

        Raises
        ------
        ValueError
            If `n_units` is anything else.
        """
        check_is_fitted(self)
        J, total = self.blocks_[0].b.size, len(self.intercepts_[0])
        whole = isinstance(n_units, int | np.integer) and not isinstance(n_units, bool)
        if not whole or not J <= n_units <= total or n_units % J:
            raise ValueError(f"n_units must be a multiple of {J} from {J} to {total}, got {n_units!r}")
        t = int(n_units) // J
        model = clone(self).set_params(n_estimators=t, units_per_step=J, activation=self._activation)
        for name in ("n_features_in_", "feature_names_in_", "classes_", "_kind", "_shape", "_activation"):
            if hasattr(self, name):
                setattr(model, name, getattr(self, name))
        model._set(self.init_, self.blocks_[:t], self.steps_[:t].tolist(), self.train_score_[:t].tolist())
        return model

    def to_torch(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network as ``nn.Sequential(Linear, activation, Linear)``: the decision function, or the prediction."""
        check_is_fitted(self)
        W, b, V, c = (torch.as_tensor(part, dtype=dtype) for part in self._network())
        first = nn.Linear(W.shape[0], W.shape[1], dtype=dtype)
        last = nn.Linear(V.shape[0], V.shape[1], dtype=dtype)
        with torch.no_grad():
            for layer, weight, bias in ((first, W, b), (last, V, c)):
                layer.weight.copy_(weight.T)
                layer.bias.copy_(bias)
        return nn.Sequential(first, MODULES[self._activation](), last)

    def _to_mlp(self, mlp: Any, out_activation: str) -> Any:
        """Give a scikit-learn network, never fitted, our weights."""
        check_is_fitted(self)
        mlp.set_params(
            hidden_layer_sizes=(len(self.intercepts_[0]),),
            activation=self._activation,
            alpha=self.alpha,
            random_state=self.random_state,
        )
        mlp.coefs_ = [weight.copy() for weight in self.coefs_]
        mlp.intercepts_ = [bias.copy() for bias in self.intercepts_]
        mlp.n_layers_, mlp.n_outputs_, mlp.out_activation_ = 3, self.coefs_[1].shape[1], out_activation
        mlp.n_iter_, mlp.loss_ = self.n_iter_, float(self.train_score_[-1])
        for name in ("n_features_in_", "feature_names_in_", "classes_"):
            if hasattr(self, name):
                setattr(mlp, name, getattr(self, name))
        return mlp

    def _check_parameters(self) -> None:
        for name, low in (("n_estimators", 1), ("units_per_step", 1), ("max_iter", 1)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
        for name in ("learning_rate", "alpha", "tol"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number) or not 0 <= value < np.inf:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not isinstance(self.subsample, int | float | np.number) or not 0 < self.subsample <= 1:
            raise ValueError(f"subsample must be in (0, 1], got {self.subsample!r}")
        options = {
            "activation": (*MODULES,),
            "solver": ("lbfgs", "projected"),
            "init": ("zero", "prior"),
            "line_search": ("newton", "exact", None),
        }
        for name, known in options.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")


class GBNNClassifier(ClassifierMixin, _GBNN):
    """A one-hidden-layer network grown by boosting; its last units can be dropped at test time.

    Parameters
    ----------
    n_estimators : int, default=200
        Boosting steps T (official package).
    units_per_step : int, default=1
        Hidden units J of each step (official; the paper tries 1 to 4). The network has T J units.
    learning_rate : float, default=1.0
        eta (official; the paper tries .025 to 1). Smaller ones are safer with many units.
    subsample : float, default=0.5
        Share of the rows that a step's units are fitted to, drawn anew each time (official; paper .25 to 1).
    activation : {"logistic", "tanh", "relu"}, default="logistic"
    alpha : float, default=1e-4
        L2 penalty of a step's weights (scikit-learn's default, which the official package leaves).
    max_iter, tol : int, default=200, and float, default=0.0
        Iterations of a step's fit (official: all of them).
    solver : {"lbfgs", "projected"}, default="lbfgs"
        How a step is fitted, see `fit_block`. ``"projected"`` with ``max_iter=10`` is several times faster.
    init : {"zero", "prior"}, default="zero"
        F_0 of more than two classes, see `initial_score`.
    line_search : {"newton", "exact", None}, default="newton"
        rho: `newton_step` as published, `exact_step`, or 1.
    warm_start : bool, default=False
        Keep the steps there are and add what is missing to `n_estimators`.
    random_state : int, RandomState or None, default=None
        Of subsamples and starting weights.

    Attributes
    ----------
    coefs_, intercepts_ : list of two arrays
        The network, as in scikit-learn's MLPs: weights (p, T J) and (T J, K), biases (T J,) and (K,).
    init_ : ndarray of shape (K,)
        F_0.
    blocks_, steps_ : list of T `Block`, and ndarray of shape (T,)
        What boosting found, and eta rho of each.
    train_score_ : ndarray of shape (T,)
        Mean loss on the training rows after every step.
    n_iter_ : int
        Steps done.
    classes_ : ndarray of shape (K,)

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> X = StandardScaler().fit_transform(X)
    >>> model = GBNNClassifier(20, solver="projected", max_iter=10, random_state=0).fit(X[::2], y[::2])
    >>> model.score(X[1::2], y[1::2]) > 0.93
    True
    >>> model.truncate(10).score(X[1::2], y[1::2]) > 0.93  # half the units
    True
    """

    classes_: np.ndarray

    def fit(self, X: ArrayLike, y: ArrayLike) -> GBNNClassifier:
        """Grow the network.

        Parameters
        ----------
        X : array-like of shape (n, p)
            Columns should be standardised, as for any such network.
        y : array-like of shape (n,)
            Class labels.

        Raises
        ------
        ValueError
            If X or y are not finite numbers and labels of one length, y holds one class, or a parameter is not one of
            those above.
        """
        with all_or_nothing(self):
            self._check_parameters()
            goes_on = self.warm_start and hasattr(self, "blocks_")
            X, y = validate_data(self, X, y, reset=not goes_on, dtype=np.float64)
            check_classification_targets(y)
            classes, codes = np.unique(y, return_inverse=True)
            if len(classes) < 2:
                raise ValueError(f"y must hold at least two classes, got one class: {classes[0]!r}")
            if goes_on and not np.array_equal(classes, self.classes_):
                raise ValueError(f"y must hold the classes {self.classes_} of the fit before, got {classes}")
            self._kind = "binary" if len(classes) == 2 else "softmax"
            Y = 2.0 * codes[:, None] - 1.0 if self._kind == "binary" else np.eye(len(classes))[codes]
            self._boost(np.asarray(X), Y, self._kind)
            self.classes_ = classes
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """The network's output: log-odds 2F of shape (n,) for two classes, else F of shape (n, K)."""
        return self._shaped(self._output(X))

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probabilities of shape (n, K): sigmoid(2F) or softmax(F)."""
        return self._probabilities(self._output(X))

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels of shape (n,)."""
        return self._answer(self._output(X))

    def staged_decision_function(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """`decision_function` after every step."""
        return map(self._shaped, self._staged_output(X))

    def staged_predict_proba(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """`predict_proba` after every step."""
        return map(self._probabilities, self._staged_output(X))

    def staged_predict(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """`predict` after every step."""
        return map(self._answer, self._staged_output(X))

    def to_mlp(self) -> MLPClassifier:
        """A fitted `sklearn.neural_network.MLPClassifier` with the same weights and the same answers."""
        mlp = self._to_mlp(MLPClassifier(), "logistic" if self._kind == "binary" else "softmax")
        mlp._label_binarizer = LabelBinarizer().fit(self.classes_)
        return mlp

    def _shaped(self, F: np.ndarray) -> np.ndarray:
        return F[:, 0] if self._kind == "binary" else F

    def _probabilities(self, F: np.ndarray) -> np.ndarray:
        if self._kind == "binary":
            return np.column_stack([expit(-F[:, 0]), expit(F[:, 0])])
        return softmax(F, axis=1)

    def _answer(self, F: np.ndarray) -> np.ndarray:
        return self.classes_[(F[:, 0] > 0).astype(int) if self._kind == "binary" else F.argmax(axis=1)]


class GBNNRegressor(RegressorMixin, _GBNN):
    """A one-hidden-layer network grown by boosting on squared error; several targets are fitted together.

    Parameters and attributes are those of `GBNNClassifier`; `init` has no effect, F_0 is the mean.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_diabetes(return_X_y=True)
    >>> X = StandardScaler().fit_transform(X)
    >>> model = GBNNRegressor(20, learning_rate=0.1, solver="projected", max_iter=10, random_state=0)
    >>> model.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.4
    True
    """

    _kind = "squared"
    _shape: tuple[int, ...]

    def fit(self, X: ArrayLike, y: ArrayLike) -> GBNNRegressor:
        """Grow the network.

        Parameters
        ----------
        X : array-like of shape (n, p)
            Columns should be standardised, as for any such network.
        y : array-like of shape (n,) or (n, K)

        Raises
        ------
        ValueError
            If X or y are not finite numbers of one length, or a parameter is not one of those above.
        """
        with all_or_nothing(self):
            self._check_parameters()
            goes_on = self.warm_start and hasattr(self, "blocks_")
            X, y = validate_data(self, X, y, reset=not goes_on, dtype=np.float64, multi_output=True, y_numeric=True)
            y = np.asarray(y, dtype=np.float64)
            self._boost(np.asarray(X), y.reshape(len(y), -1), "squared")
            self._shape = y.shape[1:]
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Predictions of shape (n,), or (n, K) if `fit` had K columns."""
        return self._shaped(self._output(X))

    def staged_predict(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """`predict` after every step."""
        return map(self._shaped, self._staged_output(X))

    def to_mlp(self) -> MLPRegressor:
        """A fitted `sklearn.neural_network.MLPRegressor` with the same weights and the same answers."""
        return self._to_mlp(MLPRegressor(), "identity")

    def _shaped(self, F: np.ndarray) -> np.ndarray:
        return F.reshape(len(F), *self._shape)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def boost_head(features: Tensor | np.ndarray, y: Tensor | np.ndarray, **options: Any) -> nn.Sequential:
    """Grow the last layers of a frozen network on its features.

    Features are standardised for the fit; the standardisation is in the weights of the first layer.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, d)
        What the frozen part gives; no gradient is asked for.
    y : Tensor or ndarray
        Class ids 0 to K - 1, int of shape (n,), or float targets of shape (n,) or (n, K).
    **options
        Of `GBNNClassifier` or `GBNNRegressor`.

    Returns
    -------
    nn.Sequential
        ``Linear, activation, Linear`` in the dtype and on the device of `features` (float32 for an array): K logits for
        class ids, of two classes as well, else the targets. It takes the place of the old last layers.

    Raises
    ------
    ValueError
        As `fit`; if class ids are not all of 0 to K - 1.

    Examples
    --------
    >>> features, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    >>> head = boost_head(features, y, n_estimators=5, max_iter=20, random_state=0)
    >>> head(features).shape
    torch.Size([60, 3])
    """
    given = features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features), dtype=torch.float32)
    X = given.detach().cpu().double().numpy()
    targets = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if X.ndim != 2 or not len(X):
        raise ValueError(f"features must have shape (n >= 1, d), got {tuple(X.shape)}")
    shift, scale = X.mean(axis=0), X.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    if targets.dtype.kind in "iu":
        ids = np.unique(targets)
        if not np.array_equal(ids, np.arange(len(ids))):
            raise ValueError(f"y must hold all class ids from 0 to K - 1, got {ids.tolist()}")
        model: Any = GBNNClassifier(**options).fit((X - shift) / scale, targets)
    elif targets.dtype.kind == "f":
        model = GBNNRegressor(**options).fit((X - shift) / scale, targets)
    else:
        raise TypeError(f"y must hold ints (class ids) or floats (targets), got {targets.dtype}")
    head = model.to_torch(torch.float64)
    with torch.no_grad():
        first, last = head[0], head[2]
        first.weight /= torch.from_numpy(scale)
        first.bias -= first.weight @ torch.from_numpy(shift)
        if targets.dtype.kind in "iu" and last.out_features == 1:  # log-odds 2F to logits (-F, F)
            two = nn.Linear(last.in_features, 2, dtype=torch.float64)
            two.weight.copy_(torch.cat([-last.weight, last.weight]) / 2)
            two.bias.copy_(torch.cat([-last.bias, last.bias]) / 2)
            head[2] = two
    return head.to(given.device, given.dtype if given.is_floating_point() else torch.float32)
