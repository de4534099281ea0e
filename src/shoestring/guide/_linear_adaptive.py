"""The linear half of adaptive guidance: unconditional predictions estimated from past ones. See `adaptive_guidance`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring._files import atomic_path

WEIGHTS_NAME = "guider_coefficients.safetensors"
BLOCK = 2**17  # columns of the Gram matrix at a time: 40 MB in float64 at T = 20


def guided_prediction(pred_cond: Tensor, pred_uncond: Tensor, guidance_scale: float) -> Tensor:
    """``e_u + s (e_c - e_u)``, rounded as `diffusers.guiders.ClassifierFreeGuidance` does.

    Examples
    --------
    >>> guided_prediction(torch.tensor([2.0]), torch.tensor([1.0]), 3.0)
    tensor([4.])
    """
    return pred_uncond + guidance_scale * (pred_cond - pred_uncond)


def gram_matrix(pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
    """``G = sum v v^T`` over all pixels and samples, v = (e_c,0, e_u,0, e_c,1, e_u,1, ...).

    Gram matrices of several batches add up. About ``4 T^2 N`` flops for N numbers a step, in float64, on the CPU.

    Parameters
    ----------
    pred_cond, pred_uncond : tensors of one shape (T, B, ...), floating
        Predictions of one batch of CFG trajectories.

    Returns
    -------
    tensor of shape (2T, 2T), float64

    Examples
    --------
    >>> gram_matrix(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]))
    tensor([[ 5., 11.],
            [11., 25.]], dtype=torch.float64)
    """
    if pred_cond.shape != pred_uncond.shape or pred_cond.ndim < 3 or not pred_cond.numel():
        raise ValueError(
            "pred_cond and pred_uncond must be of one shape (T, B, ...), "
            f"got {tuple(pred_cond.shape)} and {tuple(pred_uncond.shape)}"
        )
    c, u = pred_cond.flatten(1), pred_uncond.flatten(1)  # (T, N)
    G = torch.zeros(2 * len(c), 2 * len(c), dtype=torch.float64)
    for c_, u_ in zip(c.split(BLOCK, 1), u.split(BLOCK, 1), strict=True):
        V = torch.stack([c_.cpu(), u_.cpu()], 1).flatten(0, 1).double()  # (2T, block)
        G += V @ V.T
    if not bool(G.isfinite().all()):
        raise ValueError("pred_cond or pred_uncond holds NaN or infinity")
    return G


def fit_linear(gram: Tensor, *, ridge: float = 1e-6) -> Tensor:
    """Least-squares coefficients of LinearAG for every step, from `gram_matrix`.

    Parameters
    ----------
    gram : tensor of shape (2T, 2T)
    ridge : float, default=1e-6
        Relative to the mean square of the step's regressors, which are nearly collinear. Ours. 0: ordinary least
        squares; of several solutions the shortest.

    Returns
    -------
    tensor of shape (T, T, 2), float64
        ``[i, j, 0]`` is b^c_ij, 0 for j > i; ``[i, j, 1]`` is b^u_ij, 0 for j >= i.

    Examples
    --------
    >>> c, u = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 5)
    >>> u[0], u[1] = 2 * c[0], c[1] - c[0]
    >>> b = fit_linear(gram_matrix(c, u), ridge=0)
    >>> b[0, 0].tolist(), round(float(b[1, 1, 0]), 6)
    ([2.0, 0.0], 1.0)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) % 2 or not len(gram):
        raise ValueError(f"gram must be of shape (2T, 2T), got {tuple(gram.shape)}")
    if not (isinstance(ridge, Real) and ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge!r}")
    G = gram.double().cpu()
    steps = len(G) // 2
    b = torch.zeros(steps, 2 * steps, dtype=torch.float64)
    for i in range(steps):
        n = 2 * i + 1  # regressors e_c,0, e_u,0, ..., e_c,i
        values, Q = torch.linalg.eigh(G[:n, :n])
        values = values + ridge * values.mean()
        kept = values > values.max() * n * torch.finfo(torch.float64).eps
        Q = Q[:, kept]
        b[i, :n] = Q @ (Q.T @ G[:n, n] / values[kept])
    return b.unflatten(1, (steps, 2))


def relative_residual(gram: Tensor, coefficients: Tensor) -> Tensor:
    """``||e_u,i - ehat_u,i|| / ||e_u,i||`` of every step, from the sums alone; on the trajectories that were added up.

    Accurate to about 1e-8, as a difference of squares.

    Parameters
    ----------
    gram : tensor of shape (2T, 2T)
    coefficients : tensor of shape (T, T, 2)

    Returns
    -------
    tensor of shape (T,), float64

    Examples
    --------
    >>> c = torch.tensor([[[1.0, 0.0]]])
    >>> G = gram_matrix(c, torch.tensor([[[3.0, 4.0]]]))
    >>> relative_residual(G, fit_linear(G, ridge=0))
    tensor([0.8000], dtype=torch.float64)
    """
    G, b = gram.double().cpu(), coefficients.double().cpu().flatten(1)  # (2T, 2T), (T, 2T)
    total = G.diagonal()[1::2]  # ||e_u,i||^2
    square = total - 2 * (b * G[1::2]).sum(1) + ((b @ G) * b).sum(1)
    return (square.clamp(min=0) / total.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()


def estimate_unconditional(coefficients: Tensor, history: Tensor) -> Tensor:
    """``ehat_u,i = sum_{j<=i} b^c_ij e_c,j + sum_{j<i} b^u_ij e_u,j``. One pass over the history: 2 (2i + 1) N flops.

    Parameters
    ----------
    coefficients : tensor of shape (i + 1, 2)
        Row i of `fit_linear`, up to step i.
    history : tensor of shape (i + 1, 2, B, ...)
        ``[j, 0]`` is e_c,j, ``[j, 1]`` is e_u,j or its estimate; ``[i, 1]`` is not read.

    Returns
    -------
    tensor of shape (B, ...), dtype of history

    Examples
    --------
    >>> history = torch.tensor([[[[1.0]], [[2.0]]], [[[4.0]], [[float("nan")]]]])
    >>> estimate_unconditional(torch.tensor([[1.0, 10.0], [100.0, 0.0]]), history)
    tensor([[421.]])
    """
    flat = history.flatten(0, 1)[:-1]  # (2i + 1, B, ...)
    b = coefficients.flatten()[:-1].to(flat)
    return (b @ flat.flatten(1)).reshape(flat.shape[1:])


def linear_schedule(
    num_steps: int, guided_steps: str | Sequence[bool] = "alternate", second_half: str = "estimate"
) -> list[str]:
    """What LinearAG does at each step: "cfg" (2 calls), "estimate" (1 call) or "conditional" (1 call).

    Parameters
    ----------
    num_steps : int
    guided_steps : "alternate" or sequence of bool
        "alternate": every second step of the first half is CFG, from the first one on; 25 calls at 20 steps. Or for
        each step whether it is CFG; the others are estimated.
    second_half : {"estimate", "conditional"}
        Of "alternate".

    Examples
    --------
    >>> linear_schedule(4), linear_schedule(4, second_half="conditional")[2:]
    (['cfg', 'estimate', 'estimate', 'estimate'], ['conditional', 'conditional'])
    >>> linear_schedule(3, [True, False, True])
    ['cfg', 'estimate', 'cfg']
    """
    if second_half not in ("estimate", "conditional"):
        raise ValueError(f'second_half must be "estimate" or "conditional", got {second_half!r}')
    if isinstance(guided_steps, str):
        if guided_steps != "alternate":
            raise ValueError(f'guided_steps must be "alternate" or a sequence of bool, got {guided_steps!r}')
        first = [("cfg", "estimate")[i % 2] for i in range((num_steps + 1) // 2)]
        return first + [second_half] * (num_steps - len(first))
    if len(guided_steps) != num_steps:
        raise ValueError(f"guided_steps must have an entry for each of {num_steps} steps, got {len(guided_steps)}")
    return ["cfg" if guided else "estimate" for guided in guided_steps]


class LinearAdaptiveGuidance(BaseGuidance):
    """Classifier-free guidance whose unconditional prediction is mostly estimated from past predictions.

    `fit` it on recorded CFG runs of the same model, scheduler, number of steps and scale, with an empty negative
    prompt; then it takes 25 calls for 20 steps. Its images deviate more from CFG's than those of `AdaptiveGuidance`.

    Parameters
    ----------
    guidance_scale : float, default=7.5
        Of the trajectories it was fitted on. At 1 only the condition is asked.
    guided_steps : "alternate" or list of bool, default="alternate"
        Which steps ask twice, see `linear_schedule`.
    second_half : {"estimate", "conditional"}, default="estimate"
        What the later half of "alternate" does. The paper's 25 calls allow both.
    ridge : float, default=1e-6
        Of the fit, see `fit_linear`.
    enabled : bool, default=True

    Attributes
    ----------
    gram_ : tensor of shape (2T, 2T), float64, or None
        Sums over the trajectories so far. Those of two guiders may be added.
    coef_ : tensor of shape (T, T, 2), float64, or None
    residual_ : tensor of shape (T,), float64, or None
        `relative_residual` of every step.

    Notes
    -----
    Predictions are taken as the network makes them, of noise, v or x0. While sampling it keeps all predictions of a
    run, 2 T latents, and an estimated step reads them once. Works in modular pipelines, too. Saved are the
    configuration and `gram_` and `coef_` as safetensors, so that a loaded guider can go on with `partial_fit`.

    Examples
    --------
    >>> from shoestring import zoo
    >>> from shoestring.guide import sample
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> conditions = (torch.tensor([9, 0]), torch.full((2,), 10))
    >>> recorder = TrajectoryRecorder(2.0)
    >>> _ = sample(model, scheduler, recorder, noise, conditions, num_inference_steps=4)
    >>> guider = LinearAdaptiveGuidance(2.0).fit([recorder.trajectory])
    >>> sample(model, scheduler, guider, noise, conditions, num_inference_steps=4).num_calls
    5.0
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]
    guidance_scale: float
    guided_steps: str | list[bool]
    second_half: str
    ridge: float
    gram_: Tensor | None
    coef_: Tensor | None
    residual_: Tensor | None
    _history: Tensor | None
    _schedule: list[str]
    _step: int | None

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guided_steps: str | list[bool] = "alternate",
        second_half: str = "estimate",
        ridge: float = 1e-6,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        self.register_to_config(_use_default_values=[])  # diffusers forgets positional arguments in `new`
        check_finite("guidance_scale", guidance_scale)
        linear_schedule(1 if isinstance(guided_steps, str) else len(guided_steps), guided_steps, second_half)
        if not (isinstance(ridge, Real) and ridge >= 0 and math.isfinite(ridge)):
            raise ValueError(f"ridge must be a finite number >= 0, got {ridge!r}")
        self.guidance_scale = guidance_scale
        self.guided_steps = guided_steps
        self.second_half = second_half
        self.ridge = ridge
        self.gram_ = self.coef_ = self.residual_ = None
        self._history, self._schedule = None, []

    def fit(self, trajectories: Iterable[tuple[Tensor, Tensor]]) -> LinearAdaptiveGuidance:
        """Forget what was fitted, and fit these; one trajectory at a time, so that an iterator may make them.

        Parameters
        ----------
        trajectories : iterable of (e_c, e_u), each of shape (T, B, ...)
            Batches of CFG runs: `TrajectoryRecorder.trajectory`.
        """
        gram: Tensor | None = None
        for pred_cond, pred_uncond in trajectories:
            gram = _added(gram, gram_matrix(pred_cond, pred_uncond))
        if gram is None:
            raise ValueError("trajectories must hold at least one (e_c, e_u), got none")
        return self._solve(gram)

    def partial_fit(self, pred_cond: Tensor, pred_uncond: Tensor) -> LinearAdaptiveGuidance:
        """Add one batch of CFG runs, of shape (T, B, ...), to those before."""
        return self._solve(_added(self.gram_, gram_matrix(pred_cond, pred_uncond)))

    def _solve(self, gram: Tensor) -> LinearAdaptiveGuidance:
        coef = fit_linear(gram, ridge=self.ridge)
        self.gram_, self.coef_, self.residual_ = gram, coef, relative_residual(gram, coef)
        return self

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Before every step; step 0 begins a new run.

        Raises
        ------
        ValueError
            If it is not fitted, or for another number of steps.
        """
        if step == 0:
            self._history = None
            self._schedule = self._planned(num_inference_steps)
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The prediction guided by `pred_uncond`, or by its estimate."""
        what = self._now()
        if what == "conditional":
            pred = pred_cond
        elif what == "cfg" and pred_uncond is None:
            raise ValueError("pred_uncond is missing in a step of CFG")
        else:
            pred_uncond = self._remember(pred_cond, pred_uncond)
            pred = guided_prediction(pred_cond, pred_uncond, self.guidance_scale)
        if self._step is not None and self._step + 1 == self._num_inference_steps:
            self._history, self._step = None, None  # between runs it asks for two conditions, as CFG does
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _remember(self, pred_cond: Tensor, pred_uncond: Tensor | None) -> Tensor:
        """Keep this step's predictions, and estimate the unconditional one if there is none."""
        if pred_uncond is not None and "estimate" not in self._schedule:
            return pred_uncond
        i = self._step or 0
        if self._history is None:
            if i:
                raise ValueError(f"a run must begin at step 0, got step {i} first")
            dtype = torch.promote_types(pred_cond.dtype, torch.float32)
            self._history = pred_cond.new_empty((len(self._schedule), 2, *pred_cond.shape), dtype=dtype)
        history = self._history  # (T, 2, B, ...)
        history[i, 0] = pred_cond
        if pred_uncond is None:
            assert self.coef_ is not None  # or set_state had refused
            pred_uncond = estimate_unconditional(self.coef_[i, : i + 1], history[: i + 1])
        history[i, 1] = pred_uncond
        return pred_uncond.to(pred_cond.dtype)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._now() == "cfg" else 1

    def _is_guided(self) -> bool:
        return self._enabled and not math.isclose(self.guidance_scale, 1.0)

    def _now(self) -> str:
        if not self._is_guided():
            return "conditional"
        return "cfg" if self._step is None else self._schedule[self._step]

    def _planned(self, num_inference_steps: int) -> list[str]:
        schedule = linear_schedule(num_inference_steps, self.guided_steps, self.second_half)
        if "estimate" in schedule and self._is_guided():
            if self.coef_ is None:
                raise ValueError("LinearAdaptiveGuidance is not fitted: call fit or from_pretrained first")
            if len(self.coef_) != num_inference_steps:
                raise ValueError(f"fitted for {len(self.coef_)} steps, got num_inference_steps={num_inference_steps}")
        return schedule

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration, and what was fitted into ``guider_coefficients.safetensors`` beside it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.gram_ is not None and self.coef_ is not None:
            with atomic_path(folder / WEIGHTS_NAME) as temporary:
                save_file({"gram": self.gram_, "coef": self.coef_}, temporary)
        else:
            (folder / WEIGHTS_NAME).unlink(missing_ok=True)  # of a guider that was here before
        super().save_pretrained(folder, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> LinearAdaptiveGuidance:
        """Read what `save_pretrained` wrote, from a folder or from the hub.

        Raises
        ------
        ValueError
            If the file of coefficients is damaged or not one of these.
        """
        guider: LinearAdaptiveGuidance = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        path = _weights_path(pretrained_model_name_or_path, subfolder, kwargs)
        if path is not None:
            try:
                held = load_file(path)
                gram, coef = held["gram"], held["coef"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"{path} holds no coefficients of LinearAdaptiveGuidance: {error}") from None
            steps = len(coef)
            fits = coef.shape == (steps, steps, 2) and gram.shape == (2 * steps, 2 * steps)
            if not fits or not bool(coef.isfinite().all() & gram.isfinite().all()):
                raise ValueError(
                    f"{path} must hold finite gram (2T, 2T) and coef (T, T, 2), "
                    f"got {tuple(gram.shape)} and {tuple(coef.shape)}"
                )
            guider.gram_, guider.coef_, guider.residual_ = gram, coef, relative_residual(gram, coef)
        return guider


class TrajectoryRecorder(ClassifierFreeGuidance):
    """CFG that keeps the predictions of its last run, for `LinearAdaptiveGuidance` to be fitted on.

    Parameters are those of `diffusers.guiders.ClassifierFreeGuidance`. Every step must be guided. Memory: 2 T latents,
    on the device of the predictions.

    Attributes
    ----------
    trajectory : (e_c, e_u), each a tensor of shape (T, B, ...)

    Examples
    --------
    >>> recorder = TrajectoryRecorder(3.0)
    >>> for step in range(2):
    ...     recorder.set_state(step=step, num_inference_steps=2, timestep=torch.tensor(9 - step))
    ...     guided = recorder.forward(torch.ones(1, 4), torch.zeros(1, 4)).pred
    >>> e_c, e_u = recorder.trajectory
    >>> e_c.shape, guided[0, 0].item()
    (torch.Size([2, 1, 4]), 3.0)
    """

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        if step == 0:
            self._pairs: list[tuple[Tensor, Tensor]] = []
        super().set_state(step, num_inference_steps, timestep)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None:
            raise ValueError("a recorded run must be guided at every step: guidance_scale not 1, start 0 and stop 1")
        self._pairs.append((pred_cond.clone(), pred_uncond.clone()))
        return super().forward(pred_cond, pred_uncond)

    @property
    def trajectory(self) -> tuple[Tensor, Tensor]:
        if "_pairs" not in vars(self):
            raise ValueError("nothing was recorded yet: let the guider run first")
        pred_cond, pred_uncond = zip(*self._pairs, strict=True)
        return torch.stack(pred_cond), torch.stack(pred_uncond)


def check_finite(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number!r}")


def _added(gram: Tensor | None, more: Tensor) -> Tensor:
    if gram is None:
        return more
    if gram.shape != more.shape:
        raise ValueError(f"trajectories must be of one number of steps, got {len(gram) // 2} and {len(more) // 2}")
    return gram + more


def _weights_path(name: Any, subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
    """The file of coefficients, in a folder or fetched from the hub as diffusers does the configuration; None: none."""
    folder = Path(name) / (subfolder or "")
    if folder.is_dir():
        return folder / WEIGHTS_NAME if (folder / WEIGHTS_NAME).exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    allowed = ("cache_dir", "force_download", "token", "revision", "local_files_only")
    options = {key: kwargs[key] for key in allowed if key in kwargs}
    try:
        return Path(hf_hub_download(str(name), WEIGHTS_NAME, subfolder=subfolder, **options))
    except EntryNotFoundError:
        return None
