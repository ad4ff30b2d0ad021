"""A handle on the user's model: use it in an attack and leave no trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from ..precision import warn_if_emulated
from .balls import at_full_size
from .behind import Shared, roots
from .hidden import around_others, is_compiled
from .traces import (
    RESTLESS,
    attributes_kept,
    buffers_kept,
    gradients_kept,
    no_cached_weights,
    version_of,
)

__all__ = ["Mode", "Model", "ModelHandle", "in_full", "logits_of", "seeded", "unwrap"]

Mode = Literal["eval", "train"]
Route = Literal["clean", "auxiliary"]
Model = Callable[..., Any]
M = TypeVar("M", bound=Model)

_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
_COLLECTIVE = (DistributedDataParallel, DataParallel)
_WRAPPERS = (*_COLLECTIVE, AveragedModel)


class ModelHandle:
    """A model that an attack may call as often as it likes.

    It is not a module: the model is neither registered nor moved nor copied with what holds the
    handle. Wrappers with side effects (DDP, DataParallel, the averaged model of EMA) are taken off;
    a compiled model stays compiled. Of a callable that is no module, the module behind it (a bound
    method, a partial, a closure, an object that is called, a module that a function finds among
    global names) is frozen, and what the first call in an attack shows besides, unless it is
    compiled: modules that are hidden in other modules, in objects of objects, in imported modules.

    Args:
        model: A module, or any callable from images to logits; None until there is one.
        mode: ``"eval"`` freezes dropout and BatchNorm while the attack runs; ``"train"`` uses
            batch statistics and dropout everywhere, and puts the running statistics back.
        amp_dtype: Precision of the model during the attack; by default the caller's autocast.
        memory_format: Of the images that the model gets, such as ``torch.channels_last``.
        route: Through which branch of split BatchNorm the attack goes, ``"clean"``, unless the
            caller has chosen one, or ``"auxiliary"``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).train()
        >>> handle = ModelHandle(model)
        >>> with handle.frozen(torch.device("cpu")):
        ...     logits = handle(torch.rand(3, 1, 2, 2))
        >>> logits.shape, model.training, model[1].weight.requires_grad
        (torch.Size([3, 2]), True, True)
    """

    def __init__(
        self,
        model: Model | None,
        *,
        mode: Mode = "eval",
        amp_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        route: Route = "clean",
    ) -> None:
        if isinstance(model, type) and issubclass(model, nn.Module):
            raise TypeError(
                f"model is the class {model.__name__}: make one, {model.__name__}(...)."
            )
        if not (model is None or callable(model)):
            raise TypeError(f"model must be a module or a callable, got {type(model).__name__}.")
        if mode not in ("eval", "train"):
            raise ValueError(f'model_mode must be "eval" or "train", got {mode!r}.')
        if amp_dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                "amp_dtype must be float16, bfloat16, or for no autocast float32, as a floating "
                f"torch.dtype, got {amp_dtype!r}."
            )
        if memory_format not in (None, torch.contiguous_format, torch.channels_last):
            raise ValueError(
                f"memory_format must be torch.channels_last or contiguous_format, got "
                f"{memory_format!r}."
            )
        self._model: Shared[Model | None] = Shared(None if model is None else unwrap(model))
        if isinstance(self.model, nn.Module):  # of a callable what it calls shows in time
            _check_outermost(_parts(self.model))
        self.mode = mode
        self.amp_dtype = amp_dtype
        self.memory_format = memory_format
        self.route = route
        # What the first call tells: whether it changes its input, and what else it calls.
        self._writes: bool | None = None
        self._hidden: WeakSet[nn.Module] | None = None
        self._half = False  # whether it computes in float16, which it may choose for itself
        self._unseen = True  # whether the attack has yet to call it
        self._stack: ExitStack | None = None  # of what is put back after the attack

    @property
    def model(self) -> Model | None:
        """The model; of a copy of this its copy, where something was copied that holds both."""
        return self._model.thing

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of the model, or behind a callable that is none."""
        return list(dict.fromkeys([*_parts(self.model), *(self._hidden or ())]))

    @property
    def _known(self) -> list[nn.Module]:
        """Those whose calls need no look."""
        return [m for m in self.modules if not isinstance(m, _COLLECTIVE)]

    def to(self, model: Model | None, route: Route | None = None) -> ModelHandle:
        """A handle on another model, with the same settings but for ``route``."""
        return ModelHandle(
            model, mode=self.mode, amp_dtype=self.amp_dtype, memory_format=self.memory_format,
            route=route or self.route,
        )  # fmt: skip

    def __call__(self, images: Tensor) -> Tensor:
        """Logits in float32 at least, whatever the model computes in and does to its input."""
        given = images
        if self.memory_format is not None:
            images = images.contiguous(memory_format=self.memory_format)
        device = images.device.type
        low = None
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)
            images = images.float() if images.dtype == torch.float64 else images  # not cast by it
        else:
            images = images.to(self._dtype(images.dtype))
        if images is given and (self._writes is not False or images.is_inference()):
            images = images.clone()
        version = version_of(images)
        assert self.model is not None
        with self.watched():
            logits = logits_of(self.model(images))
        changed = version_of(images) != version
        if changed and images is given:
            raise ValueError(
                "the model changed its input in place, which it had not done before: let it work "
                "on a copy, as in x = x - mean instead of x.sub_(mean)."
            )
        self._writes = self._writes or changed
        self._half = self._half or torch.float16 in (low, logits.dtype)
        logits = in_full(logits)
        if self._half and logits.requires_grad:
            # In float16 the gradient of a sample that the model is sure of would vanish on its way
            # to the image. A direction is all that attacks want.
            logits.register_hook(at_full_size)
        return logits

    def check_alone(self, instead: str) -> None:
        """Refuse what each process decides on its own, where all must ask the model as often.

        Example:
            >>> ModelHandle(torch.nn.Linear(2, 2)).check_alone("use p=1")  # of one process alone
        """
        modules = self.modules
        if _are_sharded(modules):
            raise ValueError(
                "the model is sharded (FSDP), and waits in every pass for all processes, which "
                f"must attack as often: {instead}."
            )
        if self.mode == "train" and any(isinstance(m, nn.SyncBatchNorm) for m in modules):
            raise ValueError(
                'with model_mode="train" SyncBatchNorm waits in every pass for all processes, '
                f"which must attack as often: {instead}."
            )

    @contextmanager
    def frozen(self, device: torch.device, seed: int | None = None) -> Iterator[None]:
        """Gradients on, parameters and statistics frozen; everything as before afterwards.

        Args:
            device: Where the images are.
            seed: Of dropout in ``mode="train"``; the global generator is then left alone.
        """
        with ExitStack() as stack:
            stack.enter_context(no_cached_weights())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self.amp_dtype is not None:
                low = self.amp_dtype in (torch.bfloat16, torch.float16)
                dtype = self.amp_dtype if low else None
                warn_if_emulated(dtype, device.type, "leave amp_dtype out")
                stack.enter_context(torch.autocast(device.type, dtype, enabled=low))
            if self.mode == "train" and seed is not None:
                stack.enter_context(seeded(device, seed))
            stack.enter_context(self._still(self.modules))
            outer = self._stack, self._unseen
            self._stack = stack
            self._unseen = self._hidden is None or not isinstance(self.model, nn.Module)
            try:
                yield
            finally:
                self._stack, self._unseen = outer

    @contextmanager
    def _still(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """These modules frozen, and as before afterwards."""
        modules = [m for m in modules if hasattr(m, "training")]  # a jit.freeze has none
        modes = [module.training for module in modules]
        split = [(m, m.route) for m in modules if "auxiliary" in m._modules and hasattr(m, "route")]
        if self.route == "auxiliary":
            _check_still_split(modules)
        found = [p for m in modules for p in m._parameters.values()]
        if any(is_lazy(p) for p in found if p is not None):
            raise ValueError(
                "the model has lazy layers without weights yet: call it once with a batch, as the "
                "optimiser wants it too."
            )
        trainable = [p for p in found if p is not None and p.requires_grad and p.is_leaf]
        with ExitStack() as stack:
            if not _are_sharded(modules):  # FSDP keeps in attributes where it is in a pass
                stack.enter_context(attributes_kept(m for m in modules if not _is_ours(m)))
            stack.enter_context(buffers_kept(modules, RESTLESS if self.mode == "eval" else None))
            try:
                # Set flag by flag: a user's own train() may do more than set them.
                for module in modules:
                    # cuDNN goes no way back through a recurrent layer in eval mode; without
                    # dropout the two modes are one.
                    same = isinstance(module, nn.RNNBase) and not module.dropout
                    _set_mode(module, self.mode == "train" or same)
                for part, route in split:  # else whoever called has chosen
                    if self.route == "auxiliary" or route == "half":
                        part.route = self.route  # type: ignore[assignment]
                # Also keeps frozen weights out of autocast's cache, where torch < 2.10 would leave
                # casts without gradient for the training step.
                for parameter in trainable:
                    parameter.requires_grad_(False)
                yield
            finally:
                for part, route in split:
                    part.route = route
                for module, training in zip(modules, modes, strict=True):
                    _set_mode(module, training)
                for parameter in trainable:
                    parameter.requires_grad_()

    @contextmanager
    def watched(self, known: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Around the first call in an attack: freeze what it calls that we did not know of.

        A callable may call another module each time, a module shows at once what it hides, and
        calls it itself. A transform of ours is never the model's, nor are the known ones.
        """
        if self._stack is None or not self._unseen:
            yield
            return
        self._unseen = False
        if is_compiled(self.model):  # it would be compiled again
            self._tell_of_none()
            yield
            return
        found = WeakSet[nn.Module]()

        def still(module: nn.Module) -> AbstractContextManager[None]:
            if isinstance(module, _COLLECTIVE):
                raise ValueError(
                    f"an attack must not call the collectives of a {type(module).__name__}: call "
                    "the module inside it, as in model.module(x)."
                )
            parts = [part for part in module.modules() if not _is_ours(part)]
            _check_outermost(parts)
            found.update(parts)
            return self._still(parts)

        whole = isinstance(self.model, nn.Module)

        def concerns(module: nn.Module, inside: bool) -> bool:
            return inside or not whole or isinstance(module, _COLLECTIVE)

        usual = self._known if whole else [*self._known, *known]
        # For the time of its call alone: a caller may have changed it for that call.
        with around_others(usual, still, concerns) as calls:
            yield
        self._half = self._half or calls.half
        self._hidden = WeakSet([*(self._hidden or ()), *found])
        self._stack.enter_context(self._still(list(found)))

    @contextmanager
    def beside(
        self, device: torch.device, seed: int | None = None, known: Iterable[nn.Module] = ()
    ) -> Iterator[None]:
        """:meth:`frozen` and :meth:`watched`, around an attack of the user's.

        Transforms that the model holds are at work where the attack calls them, and gradients that
        a training gathers are out of its sight.
        """
        ours = [module for module in self.modules if _is_ours(module) and module.training]
        models = [module for module in roots(self.model) if not _is_ours(module)]
        if is_compiled(self.model):  # hooks would have it compiled again
            ours = []
        with (
            self.frozen(device, seed),
            gradients_kept(self.modules),
            _at_work(ours, models),
            self.watched(known),
        ):
            yield

    def _tell_of_none(self) -> None:
        if not self.modules and self._hidden is None:
            self._hidden = WeakSet()
            warnings.warn(
                "the model is a compiled function, behind which no module is found: it is attacked "
                "in the mode that it is in, dropout and BatchNorm as in training; compile the "
                "module, or give it instead.",
                stacklevel=3,
            )

    def _dtype(self, default: torch.dtype) -> torch.dtype:
        """The precision of the first kernel or matrix: norms and scales may have another."""
        parameters = (p for m in _parts(self.model) for p in m.parameters(recurse=False))
        kernels = (p.dtype for p in parameters if p.is_floating_point() and p.ndim > 1)
        return next(kernels, default)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle holds the settings; the model is bound again on the other side.
        return _without_model, (self.mode, self.amp_dtype, self.memory_format, self.route)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHandle:
        twin = self.to(self.model)
        twin._model = copy.deepcopy(self._model, memo)
        return twin


def _check_outermost(modules: Iterable[nn.Module]) -> None:
    if any(isinstance(m, _COLLECTIVE) for m in modules):
        raise ValueError(
            "the model holds a DistributedDataParallel or DataParallel module inside, whose "
            "collectives an attack must not call: put that wrapper outermost."
        )


def _are_sharded(modules: Iterable[nn.Module]) -> bool:
    kinds = set(map(type, modules))  # few, of many modules
    return any(base.__name__ in _SHARDED for kind in kinds for base in kind.__mro__)


def _is_ours(module: nn.Module) -> bool:
    """Whether it is a transform, which tells of its attack in attributes."""
    return isinstance(vars(module).get("handle"), ModelHandle)


@contextmanager
def _at_work(ours: Sequence[nn.Module], models: Sequence[nn.Module]) -> Iterator[None]:
    """Transforms that models hold are at work, but for the time of a model's call."""
    if not ours:
        yield
        return

    def rouse(*_: Any) -> None:
        for module in ours:
            _set_mode(module, True)

    def calm(*_: Any) -> None:
        for module in ours:
            _set_mode(module, False)

    hooks = []
    for model in models:
        hooks.append(model.register_forward_pre_hook(calm))
        hooks.append(model.register_forward_hook(rouse, always_call=True))
    rouse()
    try:
        yield
    finally:
        calm()
        for hook in hooks:
            hook.remove()


def _check_still_split(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        split = isinstance(module, _BatchNorm) and hasattr(module, "auxiliary")
        if split and not hasattr(module, "route"):
            raise ValueError(
                f"a split BatchNorm became a plain {type(module).__name__} again, which has one "
                "statistic for both halves: call SyncBatchNorm.convert_sync_batchnorm first, "
                "convert_split_batchnorm after it."
            )


def _set_mode(module: nn.Module, training: bool) -> None:
    """Past nn.Module's own setting of attributes, which takes milliseconds for many modules."""
    if "training" in vars(module):
        vars(module)["training"] = training
    else:  # of TorchScript
        module.training = training


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state begins with a seed, and is afterwards as before.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(torch.device("cpu"), 0):
        ...     x = torch.rand(2)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _without_model(
    mode: Mode,
    amp_dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    route: Route,
) -> ModelHandle:
    return ModelHandle(
        None, mode=mode, amp_dtype=amp_dtype, memory_format=memory_format, route=route
    )


def unwrap(model: M) -> M | Any:
    """The model inside DDP, DataParallel, EMA and Fabric; a compiled model as it is.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(net)) is net
        True
    """
    found: Any = model
    fabric = type(found).__name__ == "_FabricModule"  # of Lightning, which need not be there
    if fabric or isinstance(found, _WRAPPERS):
        return unwrap(found.module)
    inner = getattr(model, "_orig_mod", None)  # of torch.compile
    return unwrap(inner) if isinstance(inner, _WRAPPERS) else model


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, a tuple, a mapping or an object with ``.logits``.

    Example:
        >>> logits_of({"logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Mapping):
        for key in ("logits", "out", "output"):
            if isinstance(output.get(key), Tensor):
                return output[key]  # type: ignore[no-any-return]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    if isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    if isinstance(output, Tensor):
        return output
    raise TypeError(
        f"the model returned {type(output).__name__}; it must return logits as a tensor, first in "
        'a tuple, under the key "logits", or as the attribute .logits.'
    )


def in_full(tensor: Tensor) -> Tensor:
    """In float32 at least.

    Example:
        >>> in_full(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _parts(model: Any) -> Iterator[nn.Module]:
    """Every module of the model itself, once; torch.compile's wrapper keeps no state of its own."""
    seen: set[nn.Module] = set()
    for root in roots(model):
        for _, part in root.named_modules(seen):
            yield part
