"""What holds for every op, on every backend of this process; conftest.py makes the cases."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from dashpot import _check
from dashpot._dispatch import Chain
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

FLOAT64 = pytest.mark.cases(dtypes=torch.float64, differentiable=True, kind="op")
ONE_DTYPE = pytest.mark.cases(dtypes="one")
ONE = pytest.mark.cases(dtypes="one", backends="preferred")
ONE_GRADIENT = pytest.mark.cases(dtypes="one", backends="preferred", differentiable=True)
MAY_END_IN_TORCH = ("triton", "torch")  # partial results may be added by torch; so may a chain
CUDA = pytest.mark.cases(dtypes="one", backends="kernels", device="cuda")


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def same_bits(got, want) -> bool:
    """Equal, NaN where NaN, of the same dtypes and shapes."""
    got, want = tensors_of(got), tensors_of(want)
    return len(got) == len(want) and all(
        a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )


def is_trivial(tensor: torch.Tensor) -> bool:
    """All zero, all the same, or not finite: agreement would say nothing."""
    wide = tensor.double().flatten()
    constant = wide.numel() > 1 and bool((wide == wide[0]).all())
    return not wide.any() or constant or not bool(wide.isfinite().all())


def moved(args, how):
    """The arguments with `how` done to their tensors."""
    return tree_map(lambda leaf: how(leaf) if isinstance(leaf, torch.Tensor) else leaf, args)


def with_gradient(case, args):
    """The call as a function, and leaves that want a gradient."""
    function, tensors = case.as_function(args)
    return function, [tensor.detach().clone().requires_grad_() for tensor in tensors]


# --------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.cases(sizes="all")
def test_numbers(case):
    """Outputs and gradients: no worse than eager PyTorch at that dtype, plus a slack."""
    args = case.inputs()
    if reason := case.declined(args):
        with pytest.raises(RuntimeError) as error:
            case(*args)
        assert reason in str(error.value)
        return
    verdict = _check.compare(case.op, case.names, args, expected=case.expected())
    assert verdict.ok, str(verdict)


@pytest.mark.cases(sizes="large", dtypes="one", backends="reference")
def test_what_is_compared_is_not_trivial(case):
    compared = case.expected().truth
    assert compared
    assert not [
        name
        for name, truth in compared.items()
        if truth is not None and truth.numel() > 1 and is_trivial(truth)
    ]


@pytest.mark.cases(sizes="large", backends="kernels")
def test_outputs_lie_in_poisoned_memory(case, poison):
    """So an element that the kernel leaves out is NaN, which test_outputs would see."""
    args = case.inputs()
    poison.clear()
    outputs = tensors_of(case(*args))
    assert outputs and (poison or case.backend == "torch")
    if case.backend not in MAY_END_IN_TORCH and not isinstance(case.op, Chain):
        assert {output.untyped_storage().data_ptr() for output in outputs} <= poison


@pytest.mark.cases(sizes="large")
def test_inputs_are_left_alone(case):
    args = case.inputs()
    before = moved(args, torch.clone)
    case(*args)
    case.gradients(args)
    assert same_bits(args, before)


@pytest.mark.cases(sizes="large")
def test_two_runs_give_the_same_bits(case):
    first, second = ((case(*args), case.gradients(args)) for args in (case.inputs(), case.inputs()))
    assert same_bits(first, second)


@pytest.mark.cases(sizes="large", backends="cpp")
def test_any_number_of_threads_gives_the_same_bits(case):
    """Or, where matrix products are PyTorch's, the same bits for the same number."""
    args, results = case.inputs(), []
    for count in (1, 2, 3):
        with _check.threads(count):
            results.append((case(*args), case.gradients(args)))
            if any(op.torch_products for op in case.ops):
                assert same_bits(results[-1], (case(*args), case.gradients(args)))
                results[-1] = results[0]
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@ONE_DTYPE
def test_autocast_changes_nothing(case):
    """Neither the call nor, where a kernel has a backward of its own, the gradients: autograd runs
    the reference's as any PyTorch code, and a user leaves autocast before the backward."""
    args = case.inputs()
    outputs, gradients = case(*args), case.gradients(args)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        assert same_bits(case(*args), outputs)
        if case.is_kernel and not isinstance(case.op, Chain):
            assert same_bits(case.gradients(args), gradients)


# --------------------------------------------------------------------------------------------
# Memory layout


def transposed(tensor):
    """The same numbers, the last axis slowest."""
    return (
        tensor.movedim(-1, 0).contiguous().movedim(0, -1) if tensor.dim() > 1 else strided(tensor)
    )


def strided(tensor):
    """Every second element of a longer tensor."""
    wide = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
    return wide.flatten(-2)[..., ::2] if tensor.dim() else tensor


def misaligned(tensor):
    """Contiguous, one element past an aligned address."""
    room = tensor.new_zeros(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("layout", [transposed, strided], ids=lambda f: f.__name__)
@ONE_DTYPE
def test_strides(case, layout):
    """What a user can call, the public function and the registered op, takes any strides."""
    args = moved(case.inputs(), layout)
    with case.forced():
        if isinstance(case.op, Chain):
            outputs = case.op(*args)
        else:
            outputs = case.op._public(case.op.forward_op(*args))
    case.judge(outputs, moved(args, lambda tensor: tensor.clone().contiguous()))


@pytest.mark.cases(sizes="large")
def test_misaligned_storage(case):
    args = moved(case.inputs(), misaligned)
    verdict = _check.compare(case.op, case.names, args, expected=case.expected())
    assert verdict.ok, str(verdict)


# --------------------------------------------------------------------------------------------
# Gradients


@FLOAT64
def test_gradcheck(case):
    function, tensors = with_gradient(case, case.inputs())
    with case.forced():
        assert torch.autograd.gradcheck(function, tensors)


@FLOAT64
def test_second_derivative(case):
    """Right, or refused in words; the reference always has one."""
    function, tensors = with_gradient(case, case.inputs())
    with case.forced():
        if case.op._twice_differentiable() or not case.is_kernel:
            assert torch.autograd.gradgradcheck(function, tensors)
            return
        outputs = [output.sum() for output in function(*tensors)]
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(outputs, tensors, create_graph=True)


@ONE_DTYPE
def test_requires_grad_follows_the_mode(case):
    args = case.inputs()
    if not case.op.differentiable:
        args = moved(args, lambda t: t.requires_grad_() if t.is_floating_point() else t)
        assert not any(output.requires_grad for output in tensors_of(case(*args)))
        return
    function, tensors = with_gradient(case, args)
    with case.forced():
        assert all(output.requires_grad for output in function(*tensors))
        assert not any(out.requires_grad for out in function(*[t.detach() for t in tensors]))
        with torch.no_grad():
            assert not any(output.requires_grad for output in function(*tensors))
        with torch.inference_mode():
            assert all(output.is_inference() for output in function(*tensors))


@pytest.mark.cases(dtypes="one", differentiable=True)
def test_gradients_only_where_wanted(case):
    """One input at a time wants a gradient: its gradient is the same, the others get none."""
    args = case.inputs()
    function, tensors = case.as_function(args)
    want = case.gradients(args)
    for i in {0, len(tensors) - 1}:
        leaves = [
            tensor.detach().clone().requires_grad_(j == i) for j, tensor in enumerate(tensors)
        ]
        with case.forced():
            outputs = function(*leaves)
        torch.autograd.backward(outputs, case.weights(outputs))
        assert torch.equal(leaves[i].grad, want[i])
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


# --------------------------------------------------------------------------------------------
# torch.library, torch.compile, torch.export


@pytest.mark.cases(dtypes="one", backends="preferred", kind="op")
def test_opcheck(case):
    args = case.inputs()
    torch.library.opcheck(case.op.forward_op, args)
    if case.op.differentiable:
        _, tensors = with_gradient(case, args)
        fresh = {id(old): new for old, new in zip(case.as_function(args)[1], tensors, strict=True)}
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if tensors_of(case(*args))[0].is_floating_point():
            checks.append(
                "test_aot_dispatch_dynamic"
            )  # adds up the outputs in the first one's dtype
        fresh_args = moved(args, lambda t: fresh.get(id(t), t))
        torch.library.opcheck(case.op.forward_op, fresh_args, test_utils=checks)
        torch.library.opcheck(case.op.backward_op, backward_args(case, args))


def backward_args(case, args) -> list:
    """Arguments of <op>_backward: the forward's, its outputs, and gradients of their shapes."""
    op = case.op
    outputs = op.forward_op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [moved(output, torch.ones_like) for output in outputs]
    source = {"arg": args, "out": outputs, "grad": gradients, "needs": [[True] * len(op._slots)]}
    return [source[kind][i] for kind, i in op._plan.takes]


class Compiler:
    """A torch.compile backend that runs eagerly and keeps the graphs it was given."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(
            fw_compiler=functools.partial(self.keep, self.forward),
            bw_compiler=functools.partial(self.keep, self.backward),
        )

    @staticmethod
    def keep(graphs, graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def compile(self, function, **options):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=self.backend, **options)


def count(graph, ops) -> list[int]:
    """How often each op stands in a graph and the graphs within it."""
    modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [node.target for module in modules for node in module.graph.nodes]
    return [targets.count(op) for op in ops]


@ONE
def test_compile(case):
    """One graph, each op in it once, the right numbers, and no second graph for a second call."""
    args = case.inputs()
    compiler = Compiler()
    compiled = compiler.compile(lambda *args: case.op(*args))
    with case.forced():
        case.judge(compiled(*args), args)
        assert same_bits(compiled(*case.inputs(seed=1)), case(*case.inputs(seed=1)))
    assert len(compiler.forward) == 1
    assert count(compiler.forward[0], [op.forward_op for op in case.ops]) == [1] * len(case.ops)


@ONE_GRADIENT
def test_compiled_gradients(case):
    """The same bits as eager, from a backward graph that holds the op's backward."""
    function, tensors = with_gradient(case, case.inputs())
    compiler = Compiler()
    with case.forced():
        outputs = compiler.compile(function)(*tensors)
        gradients = torch.autograd.grad(outputs, tensors, case.weights(outputs))
    assert same_bits(gradients, case.gradients(case.inputs()))
    assert len(compiler.backward) == 1
    backward = count(compiler.backward[0], [op.backward_op for op in case.ops if op.differentiable])
    assert sum(backward) >= 1 and max(backward) == 1


@ONE
def test_compile_with_dynamic_shapes(case):
    """A length that was not seen before is no reason for a second graph."""
    compiler = Compiler()
    compiled = compiler.compile(lambda *args: case.op(*args), dynamic=True)
    with case.forced():
        for length in (case.size[-1], 2 * case.size[-1], 4 * case.size[-1]):
            args = case.inputs(size=(*case.size[:-1], length))
            assert same_bits(compiled(*args), case(*args))
    assert len(compiler.forward) == 1


@pytest.mark.cases(dtypes="one", backends="preferred", kind="chain")
def test_inductor(case):
    args = case.inputs()
    torch._dynamo.reset()
    with case.forced():
        case.judge(torch.compile(lambda *args: case.op(*args), fullgraph=True)(*args), args)


@ONE
def test_export_keeps_the_op(case):
    class Model(torch.nn.Module):
        def forward(self, *args):
            return case.op(*args)

    args = case.inputs()
    program = torch.export.export(Model(), args)
    ops = [op.forward_op for op in case.ops]
    assert count(program.graph_module, ops) == [1] * len(ops)
    with case.forced():
        assert same_bits(program.module()(*args), case(*args))


# --------------------------------------------------------------------------------------------
# torch.func, forward-mode AD, tensors that are not plain


@ONE_GRADIENT
def test_func_grad(case):
    args = case.inputs()
    function, tensors = case.as_function(args)

    def total(*tensors):
        outputs = function(*tensors)
        return sum((w * o).sum() for w, o in zip(case.weights(outputs), outputs, strict=True))

    gradients = torch.func.grad(total, argnums=tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(list(gradients), case.gradients(args))


@ONE
def test_vmap(case):
    """A batch of problems gives what the problems give one by one."""
    problems = [case.inputs(seed=seed) for seed in range(3)]
    batch = tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0],
        *problems,
    )
    in_dims = tree_map(lambda leaf: 0 if isinstance(leaf, torch.Tensor) else None, batch)
    outputs = torch.func.vmap(lambda *args: case.op(*args), in_dims=in_dims)(*batch)
    for i, args in enumerate(problems):
        case.judge(moved(outputs, lambda tensor, i=i: tensor[i]), args)


@pytest.mark.cases(dtypes=torch.float64, backends="preferred", differentiable=True)
def test_forward_mode(case):
    """<w, J t> = <J^T w, t>, by torch.func.jvp and by dual tensors."""
    function, tensors = case.as_function(case.inputs())
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    outputs, forward = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    weighted = zip(case.weights(outputs), forward, strict=True)
    left = sum((weight * tangent).sum() for weight, tangent in weighted)
    gradients = zip(case.gradients(case.inputs()), tangents, strict=True)
    right = sum((gradient * tangent).sum() for gradient, tangent in gradients)
    assert left.abs() > 0
    torch.testing.assert_close(left, right)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        dual = [forward_ad.unpack_dual(output).tangent for output in function(*duals)]
    torch.testing.assert_close(dual, list(forward))


@ONE
def test_fake_and_meta_tensors(case):
    """Shapes and dtypes without numbers: FakeTensorMode and device meta."""
    args = case.inputs()
    want = [(tuple(t.shape), t.dtype) for t in tensors_of(case(*args))]
    with FakeTensorMode() as mode:
        fake = tensors_of(case.op(*moved(args, mode.from_tensor)))
    meta = tensors_of(case.op(*moved(args, lambda tensor: tensor.to("meta"))))
    for tensors in (fake, meta):
        assert [(tuple(t.shape), t.dtype) for t in tensors] == want
    assert all(tensor.device.type == case.device for tensor in fake)


class Tagged(torch.Tensor):
    """A subclass that only goes along."""


@ONE
def test_subclass(case):
    args = case.inputs()
    got = tensors_of(case(*moved(args, lambda tensor: tensor.as_subclass(Tagged))))
    want = tensors_of(case(*args))
    assert all(type(tensor) is Tagged for tensor in got)
    assert same_bits([tensor.as_subclass(torch.Tensor) for tensor in got], want)


@pytest.fixture(scope="module")
def mesh():
    with contextlib.ExitStack() as stack:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        stack.callback(dist.destroy_process_group)
        yield dist.device_mesh.init_device_mesh("cpu", (2,))


@pytest.mark.cases(dtypes="one", backends="preferred", device="cpu", kind="op")
def test_distributed_tensor_is_refused_by_torch(case, mesh):
    from torch.distributed.tensor import distribute_tensor

    args = moved(case.inputs(), lambda tensor: distribute_tensor(tensor, mesh))
    with pytest.raises(NotImplementedError, match=f"{case.op.name}_forward.*sharding strategy"):
        case.op(*args)


# --------------------------------------------------------------------------------------------
# CUDA: never waits for the device


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
def test_no_host_synchronisation(case):
    args = case.inputs()
    case(*args)  # compiles, loads
    with no_synchronisation():
        case(*args)


@CUDA
def test_graph_capture(case):
    args = case.inputs()
    want = case(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case(*args)
    for tensor in tensors_of(got):
        tensor.zero_()
    graph.replay()
    assert same_bits(got, want)


@CUDA
def test_runs_on_the_current_stream(case):
    """A kernel that ran elsewhere would read inputs that the sleeping stream has yet to make."""
    args = case.inputs()
    want = case(*args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = moved(args, torch.zeros_like)
        torch.cuda._sleep(50_000_000)
        for slot, tensor in zip(tensors_of(late), tensors_of(args), strict=True):
            slot.copy_(tensor)
        got = case(*late)
    stream.synchronize()
    assert same_bits(got, want)
