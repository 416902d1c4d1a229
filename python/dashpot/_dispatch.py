"""The one dispatcher: from a public function to the kernel that serves the call.

An op is declared once, in its family's file (`declare`), a function made of ops with `chain`.
A backend is a module that holds functions named `<op>_forward`, `<op>_backward` and
`<op>_supports`; a kernel exists when the function with its name exists. A call travels

    eager      Op.__call__ -> the backend's function (through one autograd.Function for a gradient)
    compiled   Op.__call__ -> torch.ops.dashpot.<op>_forward, one node in the graph
    torch.func, forward-mode AD -> the reference, which is pure PyTorch and open to both

The choice is made before the call, from device, dtype and `<op>_supports`; what a kernel raises
after it was chosen is an error, never a reason to try the next one.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad

from dashpot._arrays import is_tensor, map_leaves
from dashpot._backends import BACKENDS, ORDER, Backend, Kernel, _forced

REGISTRY: dict[str, Op | Chain] = {}

_LIBRARY = torch.library.Library("dashpot", "FRAGMENT")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

# Looked up once: each of these is asked on every call.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_autocast = functools.cache(torch.amp.is_autocast_available)
_autocast_anywhere = torch._C._is_any_autocast_enabled
_NOTHING = contextlib.nullcontext()


# --------------------------------------------------------------------------------------------
# One op


def _family(function: Callable) -> str:
    """ "aggregate" of dashpot.aggregate, and of dashpot.aggregate.gram where it is a folder."""
    return function.__module__.removeprefix("dashpot.").partition(".")[0]


@dataclass
class _Plan:
    """Where each argument of `<op>_backward` comes from; read off the two schemas' names."""

    takes: list[tuple[str, int]] = field(default_factory=list)  # ("grad"|"arg"|"out"|"needs", i)
    slots: list[tuple[int, bool, bool]] = field(default_factory=list)  # (argument, list?, saved?)
    saved_outs: list[int] = field(default_factory=list)
    options: list[int] = field(default_factory=list)  # other arguments among them

    @functools.cached_property
    def pick_options(self) -> Callable[[Sequence], Sequence]:
        first, *rest = self.options or [0]
        if rest:
            return operator.itemgetter(first, *rest)
        return operator.itemgetter(slice(first, first + len(self.options)))

    gives: list[int] = field(default_factory=list)  # which forward argument each gradient is of
    _where: dict[tuple, list] = field(default_factory=dict)
    _spread: dict[tuple, tuple] = field(default_factory=dict)
    residual_free: bool = True  # uses no forward output, so its formula can be differentiated
    complete: bool = False  # names every forward argument, so the reference can be run again

    def where(self, grads: int, counts: tuple[int, ...]) -> list[int | slice]:
        """Where each argument of the backward stands in [*grads, *saved, *options, needs, None],
        if the tensor arguments hold `counts` tensors."""
        if (grads, counts) not in self._where:
            places, at = {("needs", 0): -2}, grads
            for (i, is_list, keep), count in zip(self.slots, counts, strict=True):
                if keep:
                    places["arg", i] = slice(at, at + count) if is_list else at if count else -1
                    at += count
            rest = [("out", i) for i in self.saved_outs] + [("arg", i) for i in self.options]
            places.update({key: at + i for i, key in enumerate(rest)})
            self._where[grads, counts] = [
                i if kind == "grad" else places[kind, i] for kind, i in self.takes
            ]
        return self._where[grads, counts]

    def spread(self, counts: tuple[int, ...]) -> tuple[list, list, int]:
        """Where autograd.Function keeps what belongs to the tensor arguments, if these hold
        `counts` tensors: for each its first place and the one behind its last (None: one tensor);
        for each gradient the number of its tensor argument; how many places there are."""
        if counts not in self._spread:
            spans, start = [], _Differentiable.TENSORS
            for (_, is_list, _), count in zip(self.slots, counts, strict=True):
                spans.append((start, None if count == 1 and not is_list else start + count))
                start += count
            slots = [i for i, _, _ in self.slots]
            self._spread[counts] = spans, [slots.index(i) for i in self.gives], start
        return self._spread[counts]


class Op:
    """A declared op; see `declare`. Call it with every argument of its schema, in order."""

    def __init__(self, name, forward, reference, inputs, floor, sizes, *, backward,
                 reference_backward, fake, public, prefer, torch_products):  # fmt: skip
        self.name, self.reference, self.reference_backward = name, reference, reference_backward
        self.inputs, self.floor, self.sizes, self.prefer = inputs, floor, sizes, prefer
        self.torch_products = torch_products
        self.family = _family(reference)
        self._kernels: dict[str, tuple[Kernel, ...]] = {}  # by device
        self._found: dict[str, tuple[Backend, Kernel]] = {}  # by backend
        self._reference = Kernel("reference", self._run_reference, None, None, (), frozenset())

        self.forward_op = self._define("forward", forward, self._run, fake or reference)
        schema = self.forward_op._schema
        self.arguments = [argument.name for argument in schema.arguments]
        kinds = [str(argument.type) for argument in schema.arguments]
        self._lists = frozenset(i for i, kind in enumerate(kinds) if kind == "List[Tensor]")
        self._slots = tuple(i for i, kind in enumerate(kinds) if "Tensor" in kind)
        self._tensor_args = tuple((i, i in self._lists) for i in self._slots)
        self._returns = [output.name for output in schema.returns]
        self.outputs = len(self._returns) if public is None else public
        self._sliced = self.outputs < len(self._returns)
        self._plan = None
        if backward is not None:
            self.backward_op = self._define(
                "backward", backward, self._run_backward, self._filled(reference_backward)
            )
            self._plan = self._match(self.backward_op._schema)
            torch.library.register_autograd(
                self.forward_op, self._registered_backward,
                setup_context=self._registered_context, lib=_LIBRARY,
            )  # fmt: skip

    @property
    def differentiable(self) -> bool:
        return self._plan is not None

    # ---- the call

    def __call__(self, *args):
        if _is_compiling():
            return self._public(self.forward_op(*args))
        wants_grad = False
        tensors = self._flatten(args)
        for tensor in tensors:
            if type(tensor) not in _PLAIN:
                return self._public(self.forward_op(*args))
            if tensor.requires_grad:
                wants_grad = True
        if _transforms_active() or forward_ad._current_level >= 0:
            return self._public(self._transformed(args))
        if _dispatch_modes():
            return self._public(self.forward_op(*args))
        kernel = self._choose(tensors[0], args)
        if wants_grad and _is_grad_enabled():
            if self._plan is None:
                with torch.no_grad():
                    out = kernel.forward(*args)
            elif kernel is self._reference:
                out = kernel.forward(*args)
            else:
                out = _differentiable(self, kernel, args, *tensors)
                if self.outputs == 1 and not self._returns_list:
                    return out[0]
                return list(out) if self._returns_list else out
        else:
            out = kernel.forward(*args)
        return self._public(out) if self._sliced else out

    def into(self, out: list[torch.Tensor], *args) -> None:
        """Write the public outputs into `out`, as torch's `out=`: no gradient flows."""
        if _is_grad_enabled() and any(t.requires_grad for t in (*self._flatten(args), *out)):
            raise RuntimeError(f"{self.name}: out= does not support gradients; use torch.no_grad()")
        first = self._flatten(args)[0]
        kernel = None if _is_compiling() else self._choose(first, args)
        if kernel is not None and kernel is not self._reference:
            kernel.forward(*args, out)
            return
        result = self(*args)
        for target, value in zip(out, result if self._returns_list else [result], strict=True):
            target.copy_(value)

    @functools.cached_property
    def _returns_list(self) -> bool:
        return str(self.forward_op._schema.returns[0].type) == "List[Tensor]"

    def _public(self, out):
        if self.outputs == len(self._returns):
            return out
        return out[0] if self.outputs == 1 else out[: self.outputs]

    def _flatten(self, args: Sequence) -> list[torch.Tensor]:
        tensors = []
        for i, is_list in self._tensor_args:
            if is_list:
                tensors += args[i]
            elif args[i] is not None:
                tensors.append(args[i])
        return tensors

    def _run_reference(self, *args):
        """The reference as a kernel: autocast must not lower its matrix products."""
        with _no_autocast(self._flatten(args)[0].device.type):
            return self.reference(*args)

    def _transformed(self, args):
        forced = _forced.get()
        if type(forced) is tuple and "reference" not in forced:
            raise RuntimeError(
                f"{self.name}: under torch.func or forward-mode AD only the reference can run, "
                f"but backend {', '.join(forced)} was asked for"
            )
        if isinstance(forced, _Trace):
            forced.record(self, args, "reference", "a torch.func transform or forward-mode AD")
        return self._run_reference(*args)

    # ---- the choice

    def kernel(self, name: str) -> Kernel | str:
        """This op's kernel on a backend, or one sentence that says why there is none."""
        if name == "reference":
            return self._reference
        where = BACKENDS[name]
        found, kernel = self._found.get(name, (None, None))
        if found is where:
            return kernel
        try:
            module = where.module(self.family)
        except ImportError as error:
            return f"not built: {error}"
        functions = [
            getattr(module, f"{self.name}_{part}{where.suffix}", None)
            for part in ("forward", "backward", "supports")
        ]
        if functions[0] is None:
            return f"not built: no {self.name}_forward{where.suffix} in {module.__name__}"
        self._found[name] = where, Kernel(name, *functions, where.devices, where.dtypes)
        return self._found[name][1]

    def kernels(self, device: str) -> tuple[Kernel, ...]:
        """The kernels that may serve a device, best first, without the reference."""
        if device not in self._kernels:
            order = ORDER.get(device, ())
            if self.prefer in order:
                order = (self.prefer, *(name for name in order if name != self.prefer))
            found = [self.kernel(name) for name in order]
            self._kernels[device] = tuple(one for one in found if isinstance(one, Kernel))
        return self._kernels[device]

    def _choose(self, first: torch.Tensor, args: Sequence) -> Kernel:
        forced = _forced.get()
        if forced is not None:
            return self._choose_forced(forced, first, args)
        found = self._kernels.get("cpu" if first.is_cpu else first.device.type)
        if found is None:
            found = self.kernels(first.device.type)
        for kernel in found:
            if first.dtype in kernel.dtypes and (
                kernel.supports is None or kernel.supports(*args) is None
            ):
                return kernel
        return self._reference

    def _choose_forced(self, forced, first, args) -> Kernel:
        if isinstance(forced, _Trace):
            return forced.choose(self, first, args)
        reasons = []
        for name in forced:
            kernel = self.kernel(name)
            reason = self._declined(kernel, first, args)
            if reason is None:
                return kernel
            reasons.append(f"{name}: {reason}")
        raise RuntimeError(
            f"{self.name} cannot run on the backend asked for. " + "; ".join(reasons)
        )

    def reason(self, name: str, first: torch.Tensor, args: Sequence) -> str | None:
        """Why a backend cannot take this call; None if it can."""
        return self._declined(self.kernel(name), first, args)

    def _declined(self, kernel: Kernel | str, first: torch.Tensor, args: Sequence) -> str | None:
        if type(kernel) is str or kernel is self._reference:
            return None if kernel is self._reference else kernel
        return kernel.declines(first, args)

    # ---- the gradient

    def _match(self, schema) -> _Plan:
        plan = _Plan()
        for argument in schema.arguments:
            name = argument.name
            if name == "needs_grad":
                plan.takes.append(("needs", 0))
            elif name in self.arguments:
                plan.takes.append(("arg", self.arguments.index(name)))
            elif name in self._returns:
                plan.takes.append(("out", self._returns.index(name)))
                plan.residual_free = False
            else:
                plan.takes.append(("grad", self._returns.index(name.removeprefix("grad_"))))
        named = [i for kind, i in plan.takes if kind == "arg"]
        plan.slots = [(i, i in self._lists, i in named) for i in self._slots]
        plan.options = [i for i in named if i not in self._slots]
        plan.saved_outs = [i for kind, i in plan.takes if kind == "out"]
        plan.gives = [
            self.arguments.index(out.name.removeprefix("grad_")) for out in schema.returns
        ]
        plan.complete = len(set(named)) == len(self.arguments) and not (
            self._lists.intersection(plan.gives)
        )
        return plan

    def _save(self, ctx, kernel: Kernel | None, args: Sequence, outs: Sequence) -> None:
        """Keep what `<op>_backward` names: tensors where hooks see them, options beside, and how
        many tensors each tensor argument holds."""
        plan, saved, counts = self._plan, [], []
        for i, is_list, keep in plan.slots:
            value = args[i]
            if is_list:
                counts.append(len(value))
                if keep:
                    saved += value
            elif value is None:
                counts.append(0)
            else:
                counts.append(1)
                if keep:
                    saved.append(value)
        for i in plan.saved_outs:
            saved.append(outs[i])
        ctx.save_for_backward(*saved)
        ctx.call = self, kernel, tuple(counts), plan.pick_options(args)

    def _backward_args(self, ctx, grads: Sequence, needs: list[bool]) -> list:
        _, _, counts, options = ctx.call
        pool = [*grads, *ctx.saved_tensors, *options, needs, None]
        return [pool[place] for place in self._plan.where(len(grads), counts)]

    def _twice_differentiable(self) -> Callable | None:
        """A backward that autograd can differentiate again, if there is one: the formula where it
        uses no forward output, else what autograd derives from the reference."""
        if self._plan.residual_free:
            return self.reference_backward
        return self._rerun_backward if self._plan.complete else None

    def _rerun_backward(self, *args):
        """Takes and gives what `<op>_backward` does: the reference run again on the saved
        arguments, and autograd's derivative of that."""
        forward, grads, needs = [None] * len(self.arguments), {}, []
        for (kind, i), value in zip(self._plan.takes, args, strict=True):
            if kind == "arg":
                forward[i] = value
            elif kind == "grad":
                grads[i] = value
            elif kind == "needs":
                needs = value
        out = self._run_reference(*forward)
        out = out if isinstance(out, tuple) else (out,)
        recorded = [i for i in grads if out[i].requires_grad]
        wanted = [
            i for i in self._plan.gives
            if (needs[self._slots.index(i)] if needs else forward[i].requires_grad)
        ]  # fmt: skip
        found = torch.autograd.grad(
            [out[i] for i in recorded], [forward[i] for i in wanted],
            [grads[i] for i in recorded], create_graph=True, allow_unused=True,
        )  # fmt: skip
        by_argument = dict(zip(wanted, found, strict=True))
        return tuple(by_argument.get(i) for i in self._plan.gives)

    def _filled(self, function: Callable) -> Callable:
        """A backward whose gradients left out (None) become empty: a schema has no None."""

        def run(*args):
            empty = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            grads = function(*args)
            grads = grads if isinstance(grads, tuple) else (grads,)
            kinds = [str(output.type) for output in self.backward_op._schema.returns]
            filled = tuple(
                grad if grad is not None else [] if kind == "List[Tensor]" else empty.new_empty(0)
                for grad, kind in zip(grads, kinds, strict=True)
            )
            return filled if len(filled) > 1 else filled[0]

        return run

    # ---- the registered ops

    def _define(self, part: str, schema: str, run: Callable, fake: Callable):
        name = f"{self.name}_{part}"
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dashpot::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.dashpot, name).default

    def _run(self, *args):
        args = _contiguous(args)
        with torch.no_grad():
            return self._choose(self._flatten(args)[0], args).forward(*args)

    def _run_backward(self, *args):
        args = _contiguous(args)
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        run = next((k.backward for k in self._candidates(first) if k.backward is not None), None)
        with _no_autocast(first.device.type):
            return self._filled(run or self.reference_backward)(*args)

    def _candidates(self, first: torch.Tensor) -> Iterator[Kernel]:
        """The kernels that may run a backward of which only this tensor is known."""
        forced = _forced.get()
        if type(forced) is tuple:
            kernels = [k for name in forced if isinstance(k := self.kernel(name), Kernel)]
        else:
            kernels = self.kernels(first.device.type)
        return (k for k in kernels if first.device.type in k.devices and first.dtype in k.dtypes)

    def _registered_context(self, ctx, inputs, output):
        self._save(ctx, None, inputs, output if isinstance(output, tuple) else (output,))
        ctx.count = len(inputs)

    def _registered_backward(self, ctx, *grads):
        needs = [_any(ctx.needs_input_grad[i]) for i in self._slots]
        out = self.backward_op(*self._backward_args(ctx, grads, needs))
        result = [None] * ctx.count
        for i, count in zip(self._slots, ctx.call[2], strict=True):
            if i in self._lists:
                result[i] = [None] * count  # torch wants the argument's structure, empty lists too
        for i, grad in zip(
            self._plan.gives, out if isinstance(out, tuple) else (out,), strict=True
        ):
            if needs[self._slots.index(i)]:
                result[i] = grad
        return tuple(result)


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast off; a device that has no autocast ("meta") must not be asked."""
    if _autocast_anywhere() and _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def _contiguous(args: tuple) -> tuple:
    """What kernels take. Public functions see to it themselves; autograd and callers of
    torch.ops.dashpot do not."""
    return map_leaves(torch.Tensor.contiguous, is_tensor, args)


def _any(needs) -> bool:
    return any(needs) if isinstance(needs, list | tuple) else bool(needs)


class _Differentiable(torch.autograd.Function):
    """The one autograd.Function of the library, around any op's kernel."""

    TENSORS = 3  # of forward's arguments, those before the tensors

    @staticmethod
    def forward(ctx, op: Op, kernel: Kernel, args: tuple, *tensors):
        out = kernel.forward(*args)
        if op._returns_list:
            out = public = tuple(out)
        else:
            out = out if isinstance(out, tuple) else (out,)
            public = out[: op.outputs] if op._sliced else out
        op._save(ctx, kernel, args, out)
        return public

    @staticmethod
    def backward(ctx, *grads):
        op, kernel, counts, _ = ctx.call
        run = kernel.backward
        if run is not None:  # the gradient of a sum is one number, expanded
            grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
        else:
            run = op.reference_backward
        if _is_grad_enabled():  # create_graph=True
            run = op._twice_differentiable()
            if run is None:
                raise RuntimeError(
                    f"{op.name} has no second derivative on backend {kernel.name!r}; "
                    'use `with dashpot.backend("reference")` for the forward'
                )
        spans, gives, places = op._plan.spread(counts)
        wanted = ctx.needs_input_grad
        needs = [wanted[at] if end is None else any(wanted[at:end]) for at, end in spans]
        args = op._backward_args(ctx, [list(grads)] if op._returns_list else grads, needs)
        with _no_autocast(grads[0].device.type):
            out = run(*args)
        result = [None] * places
        for i, grad in zip(gives, out if isinstance(out, tuple) else (out,), strict=True):
            if needs[i] and grad is not None:
                at, end = spans[i]
                if end is None:
                    result[at] = grad
                else:
                    result[at:end] = grad
        return tuple(result)


# Function.apply without its look for torch.func transforms, which Op.__call__ has already had.
_differentiable = super(torch.autograd.Function, _Differentiable).apply


def declare(name: str, *, forward: str, reference: Callable, inputs: Callable, floor: Callable,
            sizes: dict[str, list[tuple]], backward: str | None = None,
            reference_backward: Callable | None = None, fake: Callable | None = None,
            public: int | None = None, prefer: str | None = None,
            torch_products: bool = False) -> Op:  # fmt: skip
    """Declare an op; see CONTRIBUTING.md, "Add an op".

    forward, backward: torch schemas without the op's name. The names carry the meaning: an
        argument of `backward` called like a forward argument or output is that value, saved;
        `grad_<output>` is the incoming gradient; `needs_grad` (bool[]) says which tensor
        arguments want one; a return `grad_<argument>` is that argument's gradient.
    reference: pure PyTorch, any device and dtype, no host synchronisation: it is the fallback,
        the truth of every test, and the shape rule of torch.compile.
    reference_backward: the gradient's formula in PyTorch, for backends without their own.
    inputs: (size, dtype, device, seed) -> the op's arguments, valid and non-trivial.
    floor: (*args) -> (bytes, flops) that no implementation can avoid.
    sizes: {"test": [...], "bench": [...]}, what `inputs` takes as size.
    fake: the outputs' shapes alone, where the reference loops over sizes (which would bind a
        compiled graph to one size); otherwise the reference itself serves.
    public: how many of the outputs the caller gets; the others are residuals of the backward.
    prefer: "cuda" where its kernel beats Triton's, with the benchmark named beside it.
    torch_products: the matrix products are PyTorch's, whose order of summation depends on the
        number of threads; all other kernels give the same bits for any.
    """
    op = Op(
        name, forward, reference, inputs, floor, sizes, backward=backward, fake=fake,
        reference_backward=reference_backward, public=public, prefer=prefer,
        torch_products=torch_products,
    )  # fmt: skip
    REGISTRY[name] = op
    return op


@dataclass
class Chain:
    """A public function made of ops (`flag_aggregate` is three): no kernel of its own, but tested,
    checked and timed as one. `inputs`, `floor`, `sizes` as in `declare`."""

    name: str
    function: Callable
    ops: tuple[Op, ...]
    inputs: Callable
    floor: Callable
    sizes: dict[str, list[tuple]]
    differentiable: bool = True

    def __post_init__(self):
        self.family = _family(self.function)

    def __call__(self, *args):
        return self.function(*args)


def chain(name: str, function: Callable, ops: Sequence[Op], *, inputs: Callable, floor: Callable,
          sizes: dict[str, list[tuple]], differentiable: bool = True) -> Chain:  # fmt: skip
    REGISTRY[name] = Chain(name, function, tuple(ops), inputs, floor, sizes, differentiable)
    return REGISTRY[name]


# --------------------------------------------------------------------------------------------
# Explanation


@dataclass
class _Trace:
    """Stands where a forced backend stands, chooses as the dispatcher would, and writes it down."""

    forced: tuple[str, ...] | None
    lines: list[tuple[str, str, str]] = field(default_factory=list)  # op, backend, verdict

    def record(self, op: Op, args: Sequence, chosen: str, why: str | None = None) -> None:
        first = op._flatten(args)[0]
        for name in (*BACKENDS, "reference"):
            verdict = op.reason(name, first, args)
            verdict = "can run" if verdict is None else verdict
            if name == chosen:
                verdict = f"chosen ({why})" if why else "chosen"
            self.lines.append((op.name, name, verdict))

    def choose(self, op: Op, first: torch.Tensor, args: Sequence) -> Kernel:
        token = _forced.set(self.forced)
        try:
            kernel = op._choose(first, args)
        finally:
            _forced.reset(token)
        self.record(op, args, kernel.name, "by hand" if self.forced else None)
        return kernel
