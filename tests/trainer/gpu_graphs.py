"""What a traced graph would do on GPUs, read off the graph and TensorFlow's kernel registry.

TensorFlow's wheel for Linux registers the kernels of GPUs on machines without any, and a graph
for GPU:0 traces there too: so what would fall back to the host shows without a GPU.
"""

import collections
import contextlib
import dataclasses
import functools

import tensorflow as tf
from tensorflow.core.framework import function_pb2, kernel_def_pb2, node_def_pb2, op_def_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import kernels, op_def_registry
from tensorflow.python.ops import resource_variable_ops

# Functions are called and control flow is lowered; what they call is looked at by itself.
_CALLS = frozenset(
    ("PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf")
)
# These hand on what they are given, or say something about it: no kernel runs on the device.
_LAUNCHES_NOTHING = frozenset(
    (
        *("Const", "Identity", "IdentityN", "NoOp", "StopGradient", "PreventGradient", "Snapshot"),
        *("Reshape", "ExpandDims", "Squeeze", "Bitcast", "ReadVariableOp", "VarHandleOp"),
        *("Placeholder", "PlaceholderWithDefault", "BroadcastGradientArgs", "_Arg", "_Retval"),
    )
)


@contextlib.contextmanager
def variables_as_placed():
    """Within it, new variables say that they are on the device that was asked for.

    On a machine without GPUs they lie on the host, and what is colocated with them is asked to
    run there, which it is not where there are GPUs.
    """
    variable = resource_variable_ops.ResourceVariable
    init, device = variable.__init__, resource_variable_ops.BaseResourceVariable.device

    def noting_init(self, *args, **kwargs):
        self._asked_device = context.context().device_name
        init(self, *args, **kwargs)

    def asked_device(self):
        return getattr(self, "_asked_device", None) or self.handle.device

    variable.__init__ = noting_init
    resource_variable_ops.BaseResourceVariable.device = property(asked_device)
    try:
        yield
    finally:
        variable.__init__ = init
        resource_variable_ops.BaseResourceVariable.device = device


@dataclasses.dataclass(frozen=True)
class Operation:
    """One node of a graph: where it was asked to run, and what the registry says of that."""

    name: str
    function: str  # In which it stands; "" for the outermost graph.
    type: str
    dtypes: tuple[str, ...]  # of its type attributes
    device: str  # as asked for: "CPU", "GPU", or "" if nobody said
    has_kernel: bool  # whether a GPU has a kernel for it
    launches: bool  # whether that kernel does anything on the GPU

    @property
    def stays_on_host(self) -> bool:
        """Whether a GPU's step leaves the device for it without having been told to."""
        return self.device != "CPU" and not self.has_kernel


def operations_of(function: tf.types.experimental.ConcreteFunction) -> list[Operation]:
    """Every node of a traced function and of the functions it calls.

    Dead nodes are left out, and functions that XLA compiles are: each of those launches at least
    one kernel, and how many of them XLA alone decides.
    """
    graph = function.graph.as_graph_def()
    found = [_operation(node, "", is_constant=False) for node in graph.node]
    compiled = {
        node.attr["f"].func.name
        for called in graph.library.function
        for node in called.node_def
        if node.attr["_XlaMustCompile"].b
    }
    for called in graph.library.function:
        if called.signature.name in compiled:  # XLA has kernels of its own.
            continue
        nodes = _alive(called)
        constant = _constant(nodes)
        name = called.signature.name
        found += [_operation(node, name, is_constant=node.name in constant) for node in nodes]
    return found


def _constant(nodes: list[node_def_pb2.NodeDef]) -> set[str]:
    """Names of the nodes whose value TensorFlow computes once, before the graph runs."""
    constant: set[str] = set()
    for node in nodes:  # In an order in which inputs come first.
        inputs = {name.split(":")[0] for name in node.input if not name.startswith("^")}
        if node.op == "Const" or (
            inputs and inputs <= constant and not op_def_registry.get(node.op).is_stateful
        ):
            constant.add(node.name)
    return constant


def _alive(function: function_pb2.FunctionDef) -> list[node_def_pb2.NodeDef]:
    """The nodes of a function that its results or its effects need; the others never run."""
    nodes = {node.name: node for node in function.node_def}
    effects = [node.name for node in function.node_def if op_def_registry.get(node.op).is_stateful]
    needed = [*function.ret.values(), *function.control_ret.values(), *effects]
    alive: set[str] = set()
    while needed:
        name = needed.pop().lstrip("^").split(":")[0]
        if name in nodes and name not in alive:  # Else an argument of the function.
            alive.add(name)
            needed += nodes[name].input
    return [node for name, node in nodes.items() if name in alive]


def _operation(node: node_def_pb2.NodeDef, function: str, *, is_constant: bool) -> Operation:
    device = tf.DeviceSpec.from_string(node.device).device_type or ""
    dtypes = tuple(
        tf.dtypes.as_dtype(value.type).name
        for _, value in sorted(node.attr.items())
        if value.WhichOneof("value") == "type"
    )
    kernel = None if node.op in _CALLS else _gpu_kernel(node)
    return Operation(
        name=node.name,
        function=function,
        type=node.op,
        dtypes=dtypes,
        device=device,
        has_kernel=node.op in _CALLS or kernel is not None,
        launches=kernel is not None and not is_constant and _launches(node.op, kernel),
    )


@functools.cache
def _gpu_kernels(operation: str) -> list[kernel_def_pb2.KernelDef]:
    found = kernels.get_registered_kernels_for_op(operation).kernel
    # DEFAULT: any device that has none of its own.
    return [kernel for kernel in found if kernel.device_type in ("GPU", "DEFAULT")]


def _gpu_kernel(node: node_def_pb2.NodeDef) -> kernel_def_pb2.KernelDef | None:
    """The kernel that a GPU would run for a node, if it has any."""
    for kernel in _gpu_kernels(node.op):
        fits = all(
            node.attr[constraint.name].type in constraint.allowed_values.list.type
            for constraint in kernel.constraint
        )
        if fits:
            return kernel
    return None


def _launches(operation: str, kernel: kernel_def_pb2.KernelDef) -> bool:
    """Whether a kernel works on the device: some output of it is in the device's memory."""
    if operation in _LAUNCHES_NOTHING:
        return False
    definition: op_def_pb2.OpDef = op_def_registry.get(operation)
    in_host = set(kernel.host_memory_arg)
    return not definition.output_arg or any(
        output.name not in in_host for output in definition.output_arg
    )


def without_kernel(operations: list[Operation]) -> dict[str, int]:
    """Type and dtypes of what has no kernel on a GPU and is asked to run there -> how often."""
    counted = collections.Counter(
        f"{op.type}({', '.join(op.dtypes)})" for op in operations if op.stays_on_host
    )
    return dict(sorted(counted.items()))


def launches_per_step(operations: list[Operation]) -> int:
    """Kernels that one step starts on GPUs: those of the loop's body and of what it calls."""
    return sum(
        op.launches and op.device != "CPU" and not op.function.startswith("while_cond")
        for op in operations
        if op.function  # Else it stands outside the loop.
    )
