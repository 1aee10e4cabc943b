"""The steps of one forward pass, as NIR would have them: a step for each layer and each function between layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.deploy.nir_nodes import (
    COMMUTING,
    FUNCTIONS,
    REASONS,
    RESHAPES,
    InexpressibleError,
    Shape,
    Step,
    builder_of,
)
from spikeformers.deploy.wiring import METADATA
from spikeformers.energy.firing import plain_name
from spikeformers.neurons import Door, TimeMean

SAME = (*RESHAPES, "contiguous", "clone", "detach", "to", "float", "double", "dropout", "dropout2d")
NUMBERS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")


def steps_of(net: nn.Module, images: Tensor) -> tuple[list[Step], set[Step]]:
    """The steps of `net(images)` in order, and those that gave its results."""
    tracer = _Tracer(net)
    tracer.image("images", images)
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.no_grad(), tracer:
            result = net(images)
        return tracer.steps, set(tracer.read(result))
    finally:
        for handle in tracer.handles:
            handle.remove()


class _Tracer(TorchFunctionMode):
    """Follows tensors through one forward pass of `net`: a step for each layer, and for each function outside them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.known = WeakTensorKeyDictionary()  # tensor -> its step, and its version then
        self.names: dict[str, int] = {}
        self.modules: list[str] = [""]  # those that run, outermost first
        self.inside = 0
        self.rows, self.dtype = 0, torch.float32
        self.handles = []
        for name, module in net.named_modules():
            if name:
                before, after = (self.enter, self.leave) if _is_leaf(module) else (self.open, self.close)
                self.handles.append(module.register_forward_pre_hook(partial(before, plain_name(name))))
                self.handles.append(module.register_forward_hook(partial(after, plain_name(name)), with_kwargs=True))

    def open(self, name: str, *_) -> None:
        self.modules.append(name)

    def close(self, *_) -> None:
        self.modules.pop()

    def enter(self, *_) -> None:
        self.inside += 1

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, result: Tensor) -> None:
        self.inside -= 1
        sources = self.read((args, kwargs))
        if isinstance(module, Door):
            self.image("input", result)
        elif not sources:
            return
        elif isinstance(module, nn.Identity) or (isinstance(module, TimeMean) and module.steps == 1):
            self.known[result] = (sources[0], result._version)
        else:
            build = builder_of(module)
            self.note(name, name, type(module).__name__, sources, result, build and partial(build, module))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sources = [] if self.inside else self.read((args, kwargs))
        # Before the call, which may write to them: arguments that are the same whatever the image.
        fixed = [each for each in args if not self.read(each)] if sources else []
        leads = bool(args) and not (fixed and fixed[0] is args[0])
        result = function(*args, **kwargs)
        raw = getattr(function, "__name__", "")
        if sources and raw in NUMBERS:
            where = self.modules[-1] or "the model"
            raise ValueError(f"{where} reads numbers off a tensor ({raw}): what it computes depends on its images")
        if sources and not isinstance(result, METADATA):
            self.after(raw.strip("_"), sources, fixed, kwargs, result, leads=leads)
        return result

    def after(self, name: str, sources: list[Step], fixed: list, kwargs: dict, result: object, *, leads: bool) -> None:
        """Note what the function `name` gave; `leads`: its first argument comes from the image."""
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if len(results) == 1 and len(sources) == 1 and name in SAME and self.same(results[0], sources[0]):
            self.known[results[0]] = (sources[0], results[0]._version)
            return
        build = FUNCTIONS.get(name) if len(results) == 1 and (leads or name in COMMUTING) else None
        module = self.modules[-1]
        place = f"{module}.{name}".strip(".")
        for each in results:
            self.note(place, module, name, sources, each, build and partial(build, fixed, kwargs))

    def same(self, tensor: Tensor, step: Step) -> bool:
        return (tensor.dtype, tensor.shape[0], _shape(tensor)) == (self.dtype, self.rows, step.shape)

    def image(self, place: str, tensor: Tensor) -> None:
        """`tensor` is what the network is fed with."""
        self.rows, self.dtype = tensor.shape[0], tensor.dtype
        self.known[tensor] = (Step(self.unique(place), "", "image", _shape(tensor)), tensor._version)

    def note(
        self, place: str, module: str, what: str, sources: list[Step], result: Tensor, build: Callable | None
    ) -> None:
        """A new step, whose piece `build` makes if it can: called with name, operands and shape."""
        place, piece, shape = self.unique(place), None, _shape(result)
        try:
            if build is None:
                raise InexpressibleError(REASONS.get(what, f"NIR has no {what}"))
            if result.shape[:1] != (self.rows,):
                rows = tuple(result.shape[:1])
                raise InexpressibleError(f"it gives {rows} rows for {self.rows} of T*B: NIR sees one step at a time")
            piece, reason = build(place, sources, shape, result.dtype), ""
        except InexpressibleError as found:
            reason = str(found)
        level = max((each.level for each in sources), default=0) + bool(reason)
        self.steps.append(Step(place, module, what, shape, tuple(sources), piece, reason, level))
        self.known[result] = (self.steps[-1], result._version)

    def read(self, values: object) -> list[Step]:
        """The steps that gave the tensors in `values`."""
        found = []
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.known:
                step, version = self.known[value]
                if value._version != version:
                    raise ValueError(
                        f"a tensor from {step.place} was changed in place through a view: NIR has no views"
                    )
                found.append(step)
        return found

    def unique(self, place: str) -> str:
        self.names[place] = self.names.get(place, 0) + 1
        return place if self.names[place] == 1 else f"{place}_{self.names[place]}"


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, Door | TimeMean | nn.Identity) or builder_of(module) is not None


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape[1:])
