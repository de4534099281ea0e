r"""Adding Gradient Noise Improves Learning for Very Deep Networks.

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens. 2015, arXiv 1511.06807.

Idea
----
Gaussian noise is added to the gradient before the optimizer's step, with a variance that falls as training goes on.
It moves very deep or badly initialised networks off plateaus and saddles on which the gradient itself is (nearly) zero.

Equations
---------
At step t = 0, 1, 2, ..., for every coordinate of the gradient, after clipping and before whatever the optimizer does::

    g_t  <-  g_t + N(0, sigma_t^2),        sigma_t^2 = eta / (1 + t)^gamma

eta is a VARIANCE: that of the first step. gamma = 0.55; the paper chooses eta from {0.01, 0.3, 1.0}. The noise is
independent from coordinate to coordinate and from step to step, and E[g] is left as it is. Because it enters before
the optimizer, learning rate, momentum and Adam's moments act on it: plain SGD with rate lr, where the gradient is zero,
walks at random, and after T steps each weight has moved by a variance of (`walk_variance`)::

    lr^2 eta sum_{t<T} (1 + t)^-gamma,     about lr^2 eta T^0.45 / 0.45

What to expect
--------------
* All-zero initialisation of a ReLU network of L >= 3 layers gives no gradient except in the last bias. With noise the
  walk above breaks the symmetry; the deeper the network, the longer it takes, and the larger eta has to be.
* Good initialisation, normalisation layers, skip connections: there is no plateau, and no gain is to be expected.
* Adam and its kin divide by the size of the gradient: where that is below sigma_t, the step is noise of the size of
  lr. Use eta = 0.01 or less with them, or plain SGD.
* A parameter that gets a gradient of zeros (rows of an embedding that were not in the batch) is moved by noise alone;
  `params` names those that are to get it.
* It is not Langevin dynamics (SGLD), whose noise is tied to the learning rate so that a posterior is sampled.

Code and paper
--------------
The paper has no official code, and its text was not read: equations and defaults are those of the card of this project,
on which optax, oryx and Chainer agree. optax counts from 1 with eta / count^gamma, which is the same. espnet's
``add_gradient_noise`` takes the equation's right side for the standard deviation, and a step for every 100 iterations:
not followed. After clipping, before the learning rate, one draw an update whatever the number of backward calls: a
step pre-hook is where all three hold.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoestring.train._checks import check_number, with_gradient

if TYPE_CHECKING:
    from transformers import TrainerCallback

    GradientNoiseCallback: type[TrainerCallback]

__all__ = ["GradientNoise", "GradientNoiseCallback", "add_gradient_noise_", "noise_std", "walk_variance"]

SLAB = 2**20  # numbers drawn in one call for many small gradients: 4 MB
Slab = tuple[list[int], Tensor, list[Tensor]]  # which gradients, their noise in one piece, and seen in their shapes


# ---- the mathematics


def noise_std(step: int, eta: float = 0.01, gamma: float = 0.55) -> float:
    """``sigma_t = sqrt(eta / (1 + t)^gamma)``, the standard deviation of the noise.

    Parameters
    ----------
    step : int >= 0
        t, the updates done so far.
    eta : float >= 0, default=0.01
        Variance of the noise in the first step; the paper chooses from {0.01, 0.3, 1.0}.
    gamma : float >= 0, default=0.55
        The paper's; 0 is noise that does not fall.

    Raises
    ------
    TypeError, ValueError
        If one of them is no such number.

    Examples
    --------
    >>> noise_std(0, eta=0.04)
    0.2
    >>> round(noise_std(1023, eta=0.04), 4)  # 0.2 / 2^(10 * 0.55 / 2)
    0.0297
    """
    _check(eta, gamma)
    return math.sqrt(eta) * (1 + _count("step", step)) ** (-gamma / 2)


def walk_variance(steps: int, lr: float, eta: float = 0.01, gamma: float = 0.55) -> float:
    """``lr^2 eta sum_{t<T} (1 + t)^-gamma``: how far plain SGD drifts in T steps where the gradient is zero.

    Parameters
    ----------
    steps : int >= 0
        T.
    lr : float
        The learning rate.
    eta, gamma : float
        As in `noise_std`.

    Examples
    --------
    >>> walk_variance(2, lr=0.5, eta=1.0, gamma=1.0)  # 0.5^2 (1 + 1/2)
    0.375
    """
    _check(eta, gamma)
    return lr**2 * eta * sum((1 + t) ** -gamma for t in range(_count("steps", steps)))


@torch.no_grad()
def add_gradient_noise_(
    parameters: Iterable[Tensor], step: int, eta: float, gamma: float, generator: torch.Generator
) -> None:
    """Add the noise of step t to the gradients of `parameters`, in place: for training loops of your own.

    Parameters
    ----------
    parameters : iterable of tensor, or a tensor
        Those without a gradient, or with ``requires_grad=False``, are left alone.
    step : int >= 0
        t, the updates done so far.
    eta, gamma : float
        As in `noise_std`. With eta = 0 nothing is drawn.
    generator : torch.Generator
        On the device of all the gradients.

    Raises
    ------
    RuntimeError
        If a gradient is sparse.
    TypeError, ValueError
        If step, eta or gamma is no such number, or the generator is on another device. Nothing has changed then.

    Examples
    --------
    >>> w = torch.zeros(4, requires_grad=True)
    >>> w.sum().backward()
    >>> add_gradient_noise_([w], 0, 0.01, 0.55, torch.Generator().manual_seed(0))
    >>> w.grad
    tensor([1.1541, 0.9707, 0.7821, 1.0568])
    """
    sigma = noise_std(step, eta, gamma)
    grads = _gradients([parameters] if isinstance(parameters, Tensor) else parameters)
    devices = {g.device for g in grads}
    if len(devices) > 1 or any(device.type != generator.device.type for device in devices):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"generator must be on the one device of all gradients, {found}, got {generator.device}")
    if sigma > 0 and grads:
        _add_noise_(grads, sigma, generator, _slabs([g.shape for g in grads], grads[0].device))


def _add_noise_(grads: Sequence[Tensor], sigma: float, generator: torch.Generator, slabs: Sequence[Slab]) -> None:
    """``g += N(0, sigma^2)`` on one device. Drawn in float32 for every dtype, added with one rounding to that of g."""
    large = set(range(len(grads)))
    for members, flat, noise in slabs:
        flat.normal_(0.0, sigma, generator=generator)
        torch._foreach_add_([grads[i] for i in members], noise)
        large.difference_update(members)
    for i in sorted(large):
        xi = torch.empty(grads[i].shape, dtype=torch.float32, device=grads[i].device)
        grads[i].add_(xi.normal_(0.0, sigma, generator=generator))


def _slabs(shapes: Sequence[torch.Size], device: torch.device) -> list[Slab]:
    """Buffers for the noise of all gradients that fit into one, in order; the larger ones are drawn one by one.

    The buffers share one memory, so that it is 4 MB for a model of any size.
    """
    members: list[list[int]] = []
    room = 0
    for i, shape in enumerate(shapes):
        if shape.numel() <= SLAB:
            if shape.numel() > room or not members:
                members.append([])
                room = SLAB
            members[-1].append(i)
            room -= shape.numel()
    sizes = [[shapes[i].numel() for i in slab] for slab in members]
    memory = torch.empty(max(map(sum, sizes), default=0), dtype=torch.float32, device=device)
    slabs = []
    for slab, numbers in zip(members, sizes, strict=True):
        flat = memory[: sum(numbers)]
        views = [xi.view(shapes[i]) for i, xi in zip(slab, flat.split(numbers), strict=True)]
        slabs.append((slab, flat, views))
    return slabs


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Of those that are trained, as real tensors that share their memory."""
    grads = []
    for p in parameters:
        g: Any = p.grad
        if g is None or not p.requires_grad:
            continue
        if g.layout is not torch.strided:
            with_gradient([p], "GradientNoise")  # raises
        if type(g) is not Tensor and hasattr(g, "to_local"):
            g = g.to_local()  # a DTensor: the shard of this process
        grads.append(torch.view_as_real(g) if g.is_complex() else g)
    return grads


# ---- any optimizer


class GradientNoise:
    """Annealed Gaussian noise on the gradients, before every step of an optimizer.

    Made once, beside the optimizer; the training loop stays as it is. It is a step pre-hook, so it comes after
    ``clip_grad_norm_``, after accumulation over several backward calls, and not at all in a step that a gradient scaler
    skips. Its t counts the steps of the optimizer; learning rate schedulers have nothing to do with it.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any but LBFGS. A wrapper such as accelerate's, which holds the real one in ``.optimizer``, will do.
    eta : float >= 0, default=0.01
        Variance of the noise in the first step, the paper's for its 20-layer network; it chooses from
        {0.01, 0.3, 1.0}. 0 leaves everything as it was, bit for bit, and draws nothing.
    gamma : float >= 0, default=0.55
        The paper's exponent.
    generator : torch.Generator, optional
        What the noise is drawn from; the global generators are never touched. Default: a new one with seed 0 (see
        Notes). For gradients on a second, third, ... device, new ones are made with its seed + 1, 2, ....
    params : iterable of tensor, optional
        The parameters whose gradients get noise. Default: all of the optimizer, those added later too.

    Attributes
    ----------
    t : int
        Updates done.
    eta, gamma : float
        May be changed between steps.
    std : float
        Standard deviation of the noise in the next step.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, here. In ``optimizer.step()``, before anything has changed, RuntimeError for a sparse gradient.

    Notes
    -----
    **Seeds.** The default is the same in every process because all replicas of DDP must add the same noise. Therefore
    also two runs, and two optimizers in one program, get the same noise unless each is given its own generator:
    ``torch.Generator().manual_seed(seed)``. With sharded parameters (FSDP) every process draws for its own shard, and
    wants a seed of its own, such as its rank.

    **Saving.** ``state_dict()`` holds t, eta, gamma and the state of the generators, as numbers and tensors. Save it
    beside the optimizer's, which does not contain it; ``loop.fit`` does so if this object is one of its `callbacks`.
    A copied or unpickled optimizer has lost the noise (as all hooks): make it again, and load.

    **Closures.** Noise is added to what every call of the closure leaves in the gradients, at the std of the step.
    LBFGS is refused: it takes differences of gradients for curvature, and those would be noise. A closure that leaves
    the backward pass to the optimizer gets its noise too early: attach to the optimizer inside.

    **Precision.** Noise is drawn in float32 and added in the dtype of the gradient. Real and imaginary parts of complex
    gradients are two coordinates. NaN and infinity stay where they are and as they are. With a fused optimizer and a
    gradient scaler, which leaves gradients scaled, noise is scaled as well; to know whether the step will be skipped, a
    GPU is waited for.

    **Cost.** 4 to 5 ns a coordinate on a CPU, where torch draws numbers on one thread only, and about 0.1 ms: 2 to 6 %
    of a training step of a small conv net or transformer, but 18 to 22 % of one of the paper's 20-layer perceptron and
    49 to 83 % of a wide one's, whose steps have few operations a weight (``benchmarks/gradient_noise.py``). Memory:
    4 MB, and for gradients larger than that a float32 copy of one at a time. ``torch.compile`` leaves it out of the
    graph.

    **Subclasses.** An optimizer whose ``step`` calls the ``step`` of its base class may run its hooks twice, as torch
    has it, and gets noise twice.

    Examples
    --------
    >>> w = torch.zeros(3, requires_grad=True)
    >>> optimizer = torch.optim.SGD([w], lr=1.0)
    >>> noise = GradientNoise(optimizer, eta=0.04, generator=torch.Generator().manual_seed(1))
    >>> w.grad = torch.zeros(3)
    >>> optimizer.step()
    >>> w
    tensor([-0.1323, -0.0534, -0.0123], requires_grad=True)
    >>> noise.t, round(noise.std, 4)  # 0.2 / 2^(0.55 / 2)
    (1, 0.1653)
    >>> noise.remove()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        eta: float = 0.01,
        gamma: float = 0.55,
        *,
        generator: torch.Generator | None = None,
        params: Iterable[Tensor] | None = None,
    ) -> None:
        optimizer = _innermost(optimizer)
        _check(eta, gamma)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.optimizer = optimizer
        self.t, self.eta, self.gamma = 0, float(eta), float(gamma)
        self.params = None if params is None else _check_params(params, optimizer)
        self._seed = 0 if generator is None else generator.initial_seed()
        self._generators = {} if generator is None else {generator.device: generator}
        self._restored: Sequence[Tensor] = ()  # states of generators, also of those not made yet
        self._kept: dict[torch.device, tuple[list[torch.Size], list[Slab]]] = {}
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def std(self) -> float:
        """Standard deviation of the noise in the next step."""
        return noise_std(self.t, self.eta, self.gamma)

    def remove(self) -> None:
        """Take the noise off the optimizer; a second call does nothing."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """t, eta and gamma as numbers, and the states of the generators as tensors: no pickle is needed."""
        generators = [generator.get_state() for generator in self._generators.values()]
        generators += [state.clone() for state in self._restored[len(generators) :]]
        return {"t": self.t, "eta": self.eta, "gamma": self.gamma, "generators": generators}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit, on the same kind of device. eta and gamma are those saved.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If it is no such state, or one of another kind of device.
        """
        if missing := {"t", "eta", "gamma", "generators"} - set(state_dict):
            raise ValueError(f"state_dict must be one of GradientNoise, with {', '.join(sorted(missing))}")
        t, eta, gamma = _count("t", state_dict["t"]), state_dict["eta"], state_dict["gamma"]
        _check(eta, gamma)
        restored = [state.detach().cpu().clone() for state in state_dict["generators"]]
        for generator, state in zip(self._generators.values(), restored, strict=False):
            generator.set_state(state)
        self.t, self.eta, self.gamma, self._restored = t, float(eta), float(gamma), restored

    def __call__(self, state: Any) -> None:
        """Do nothing: what makes it a callback of `shoestring.loop.fit`, which then saves and restores it."""

    def __repr__(self) -> str:
        name = type(self.optimizer).__name__
        return f"GradientNoise({name}, eta={self.eta:g}, gamma={self.gamma:g}, t={self.t}, std={self.std:.3g})"

    @torch.compiler.disable
    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = self.t
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._update(t)
            return None

        @functools.wraps(closure)
        def noisy_closure() -> Any:
            loss = closure()
            self._update(t)
            return loss

        if len(args) > 1:
            return (args[0], noisy_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": noisy_closure}

    @torch.no_grad()
    def _update(self, t: int) -> None:
        """Add the noise of step t."""
        sigma = noise_std(t, self.eta, self.gamma)
        # A scaler hands scaled gradients to fused optimizers, also in steps these are to skip, and says so here.
        scale, found_inf = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if found_inf is not None and float(found_inf) > 0:
            return
        if scale is not None:
            sigma *= float(scale)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.params is not None:
            chosen = {id(p) for p in self.params}
            parameters = [p for p in parameters if id(p) in chosen]
        grads = _gradients(parameters)
        if sigma > 0:
            devices = {g.device: None for g in grads}  # in order
            for device in devices:
                here = grads if len(devices) == 1 else [g for g in grads if g.device == device]
                shapes = [g.shape for g in here]
                if self._kept.get(device, (None,))[0] != shapes:
                    self._kept[device] = shapes, _slabs(shapes, device)
                _add_noise_(here, sigma, self._generator(device), self._kept[device][1])
        self.t = t + 1

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            number = len(self._generators)
            generator = torch.Generator(device).manual_seed((self._seed + number) % 2**64)
            if number < len(self._restored):
                generator.set_state(self._restored[number])
            self._generators[device] = generator
        return self._generators[device]


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose step hooks are called: wrappers (accelerate) have none."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must not be LBFGS: it takes differences of gradients for curvature, noise and all")
    return optimizer


def _check_params(params: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got a tensor")
    params = list(params)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in params:
        if id(p) not in own:
            got = f"one of shape {tuple(p.shape)} that is not" if isinstance(p, Tensor) else repr(p)
            raise ValueError(f"params must be parameters of the optimizer, got {got}")
    return params


def _check(eta: Any, gamma: Any) -> None:
    check_number("eta", eta, 0)
    check_number("gamma", gamma, 0)


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {number}")
    return number


# ---- transformers


@functools.cache
def _callback_class() -> type:
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState
    except ImportError as error:
        raise ImportError("GradientNoiseCallback needs transformers: pip install 'shoestring[text]'") from error

    class GradientNoiseCallback(TrainerCallback, ExportableState):
        """`GradientNoise` on the optimizer of a ``transformers.Trainer``, for as long as it trains.

        It attaches itself where training begins, to whatever optimizer the Trainer has made, and its state is written
        with every checkpoint, so that ``trainer.train(resume_from_checkpoint=...)`` goes on bit for bit. Needs
        transformers, which is imported when this name is first asked for.

        Parameters
        ----------
        eta, gamma : float
            As in `GradientNoise`.
        seed : int, default=0
            Of the noise; the same in every process.

        Attributes
        ----------
        noise : GradientNoise or None
            While it trains, and after.

        Examples
        --------
        >>> Trainer(model, arguments, train_dataset=rows, callbacks=[GradientNoiseCallback(eta=0.3)])  # doctest: +SKIP
        """

        def __init__(self, eta: float = 0.01, gamma: float = 0.55, *, seed: int = 0) -> None:
            _check(eta, gamma)
            self.eta, self.gamma, self.seed = eta, gamma, _count("seed", seed)
            self.noise: GradientNoise | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._detach()
            generator = torch.Generator().manual_seed(self.seed)
            noise = GradientNoise(kwargs["optimizer"], self.eta, self.gamma, generator=generator)
            # On resuming, the Trainer restores callbacks only if told so; their states are here in any case.
            saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
            if saved is not None:
                noise.load_state_dict(_from_json(saved["attributes"]["noise_state"]))
            self.noise = noise

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._detach()

        def state(self) -> dict[str, Any]:
            """What the Trainer writes into ``trainer_state.json``."""
            options = {"eta": self.eta, "gamma": self.gamma, "seed": self.seed}
            noise_state = None if self.noise is None else _to_json(self.noise.state_dict())
            return {"args": options, "attributes": {"noise_state": noise_state}}

        def _detach(self) -> None:
            if self.noise is not None:
                self.noise.remove()

    GradientNoiseCallback.__qualname__ = "GradientNoiseCallback"
    return GradientNoiseCallback


def _to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "generators": [bytes(s.tolist()).hex() for s in state["generators"]]}


def _from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    generators = [torch.tensor(list(bytes.fromhex(s)), dtype=torch.uint8) for s in state["generators"]]
    return {**state, "generators": generators}


def __getattr__(name: str) -> Any:
    if name == "GradientNoiseCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
