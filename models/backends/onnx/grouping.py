"""Query heads that share keys/values as rows of one product: what grouped-query attention is on a CPU.

ONNX Runtime's attention operator multiplies head by head, and puts the keys/values of a head in order for its
product each time: three times where three heads share them, though each brings a lone row. Where that takes
long, the operator sees as many heads as there are keys/values, each with the rows of all heads of its group.
A graph holds both ways, which give the same bits.

B rows, Q new tokens, H heads, K of keys/values, G = H / K heads of a group, W their width; R = G * Q query
rows, first the tokens of each group's first head, then those of the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from models.families.stack import StackView

FEW, MANY = 5, 256  # a window of so many tokens at most gains by it, where so many others are attended to
OPERATOR = "GroupQueryAttention"


class Groups(NamedTuple):
    """Of an attention's heads."""

    heads: int  # H
    kv_heads: int  # K

    @classmethod
    def of(cls, view: StackView) -> Groups | None:
        """Those of a model's attentions; None where no heads share keys/values."""
        kv_heads = view.key_value_shape[0]
        return cls(view.heads_of_group * kv_heads, kv_heads) if view.heads_of_group > 1 else None

    @property
    def size(self) -> int:
        return self.heads // self.kv_heads

    @property
    def most_rows(self) -> int:
        """R of no window is larger."""
        return FEW * self.size

    def gains(self, new: int, past: int, limit: int) -> bool:
        """Whether a window of so many tokens after so many others is faster in groups; `limit`: of R."""
        return new * self.size <= limit and (new == 1 or (new <= FEW and past >= MANY))

    def inputs(self, new: int, grouped: bool) -> dict[str, np.ndarray]:
        """Of a graph that has both ways."""
        return {
            "grouped": np.array(grouped),
            "blocks": self.blocks(new),
            "kept_blocks": self.kept_blocks(new),
        }

    def blocks(self, new: int) -> np.ndarray:
        """(R, 3 * K): which of the Q * (H + 2 * K) blocks of W numbers, that queries, keys and values of the
        tokens are, make each row. Keys/values of rows beyond the Q tokens are never seen."""
        head, token = np.divmod(np.arange(new * self.size)[:, None], new)
        kv_head, blocks = np.arange(self.kv_heads), self.heads + 2 * self.kv_heads
        stored = np.minimum(np.arange(new * self.size), new - 1)[:, None] * blocks + self.heads + kv_head
        return np.concatenate(
            [token * blocks + kv_head * self.size + head, stored, stored + self.kv_heads], 1
        )

    def kept_blocks(self, new: int) -> np.ndarray:
        """(Q, H): which of the R * K blocks that the operator makes is each token's of each head."""
        kv_head, head = np.divmod(np.arange(self.heads), self.size)
        return (head * new + np.arange(new)[:, None]) * self.kv_heads + kv_head

    def later(self, new: int) -> np.ndarray:
        """(R, R) bool: which of the keys of the newest R positions a row must not see."""
        return np.arange(new * self.size) > np.arange(new * self.size)[:, None] % new


def group_heads(graph: ir.Graph, width: int) -> None:
    """Let every attention whose heads share keys/values take them in groups of rows where the input `grouped`
    says so, which then reads `blocks` and `kept_blocks` instead of `queries` and `kept`."""
    attentions = [node for node in graph if node.op_type == OPERATOR and shares(node)]
    if not attentions:
        return
    flag = add_input(graph, "grouped", ir.DataType.BOOL, [])
    blocks = add_input(graph, "blocks", ir.DataType.INT64, ["grouped_rows", None])
    kept_blocks = add_input(graph, "kept_blocks", ir.DataType.INT64, ["new", None])
    for attention in attentions:
        packed, queries = choice_of(attention).inputs
        (kept,) = attention.outputs[0].consumers()
        apart, grouped = Branch(f"{attention.name}.apart"), Branch(f"{attention.name}.grouped")
        apart.attend(attention, packed, queries, kept.inputs[1])
        grouped.attend_in_groups(attention, packed, width, blocks, kept_blocks)
        branches = {"then_branch": grouped.graph(), "else_branch": apart.graph()}
        choice = ir.node("If", [flag], branches, num_outputs=3)
        graph.insert_before(kept, choice)
        for old, new in zip([kept.outputs[0], *attention.outputs[1:]], choice.outputs, strict=True):
            new.name, old.name = old.name, None
            new.shape, new.type = old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove([attention, kept], safe=True)


def choice_of(attention: ir.Node) -> ir.Node:
    """Of the rows that an attention reads: Gather."""
    packed = attention.inputs[0]
    choice = None if packed is None else packed.producer()
    assert choice is not None
    return choice


def shares(attention: ir.Node) -> bool:
    return attention.attributes["num_heads"].as_int() > attention.attributes["kv_num_heads"].as_int()


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[str | None]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


class Branch:
    """A graph of operators, one after the other, whose results have names of their own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.results: list[ir.Value] = []

    def graph(self) -> ir.Graph:
        return ir.Graph([], self.results, nodes=self.nodes, name=self.name)

    def add(
        self, operator: str, inputs: list[ir.Value | None], count: int = 1, **options: Any
    ) -> list[ir.Value]:
        domain, attributes = options.pop("domain", ""), options
        node = ir.node(operator, inputs, attributes, domain=domain, num_outputs=count)
        for value in node.outputs:
            value.name = f"{self.name}.{len(self.nodes)}.{value.index()}"
        self.nodes.append(node)
        return list(node.outputs)

    def gather(self, states: ir.Value | None, places: ir.Value | None) -> ir.Value:
        return self.add("Gather", [states, places], axis=1)[0]

    def reshape(self, states: ir.Value | None, last: int) -> ir.Value:
        """(B, ..., `last`), whatever lies between."""
        (shape,) = self.add("Constant", [], value_ints=[0, -1, last])
        return self.add("Reshape", [states, shape])[0]

    def repeat(self, attention: ir.Node, packed: ir.Value, **changed: int) -> list[ir.Value]:
        """The operator on other rows: what it makes of them, and the buffers with the new keys, values."""
        options = {name: attribute.value for name, attribute in attention.attributes.items()}
        inputs = [packed, *attention.inputs[1:]]
        return self.add(OPERATOR, inputs, 3, domain=attention.domain, **options | changed)

    def attend(
        self, attention: ir.Node, packed: ir.Value | None, queries: ir.Value | None, kept: ir.Value | None
    ) -> None:
        """Head by head, as the layer has it, on (B, Q, (H + 2 * K) * W)."""
        made, *buffers = self.repeat(attention, self.gather(packed, queries))
        self.results = [self.gather(made, kept), *buffers]

    def attend_in_groups(
        self,
        attention: ir.Node,
        packed: ir.Value | None,
        width: int,
        blocks: ir.Value,
        kept_blocks: ir.Value,
    ) -> None:
        """The same, one head of keys/values after the other."""
        heads, kv_heads = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        rows = self.gather(self.reshape(packed, width), blocks)  # (B, R, 3 * K, W)
        made, *buffers = self.repeat(attention, self.reshape(rows, 3 * kv_heads * width), num_heads=kv_heads)
        merged = self.gather(self.reshape(made, width), kept_blocks)  # (B, Q, H, W)
        self.results = [self.reshape(merged, heads * width), *buffers]
