"""The block of a linear layer: PEFT's LoRA, s B A, with A `(r, in_features)` and B `(out_features, r)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.products import HALVES, autocasts, expand, project, rows_of, working_dtype
from peft_reslora.reslora.shortcuts import block_hidden, input_hidden
from peft_reslora.reslora.sums import SharedSum, wide_sum
from peft_reslora.shared.host import is_bare_linear, is_transformed
from peft_reslora.shared.offloading import held_tensor
from peft_reslora.shared.tensors import NOT_HERE, is_readable

Factors = tuple[torch.Tensor, torch.Tensor]  # A, B
Term = tuple[torch.Tensor, torch.Tensor, float]  # A, B and s of one layer whose update takes part


FACTOR_NAMES = ("lora_A", "lora_B")  # the layer's attributes, and parts of the keys of a checkpoint
FACTOR_KEYS = tuple(f"{name}.weight" for name in FACTOR_NAMES)


class LinearBlock:
    """One adapter's block on one of PEFT's LoRA layers over `nn.Linear`, a quantized linear layer or Conv1D.

    A view, made for each use: it holds nothing but the layer, and `modules`: those of A and B, whose calls multiply by
    them, wherever engines keep the numbers.
    """

    # Of the layer's attributes that hold A and B, which the form of the layer decides, and what the kind adds to them.
    factor_names: ClassVar[tuple[str, str]] = FACTOR_NAMES
    own_names: ClassVar[tuple[str, ...]] = ()
    adds_up: ClassVar[bool] = True  # whether the updates of several layers can be added one by one
    is_linear: ClassVar[bool] = True  # whether A and B are multiplied by features, the last dimension of x
    __slots__ = ("adapter_name", "layer", "modules")

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer = layer
        self.adapter_name = adapter_name
        self.modules: tuple[Any, ...] = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layer's attributes that hold what is trained."""
        return (*self.factor_names, *self.own_names)

    @property
    def groups(self) -> int:
        """How many groups share the directions evenly, one after the other: one, but in convolutions."""
        return 1

    @property
    def transposed(self) -> bool:
        """Whether the base weight is `(in, out)`."""
        return self.layer.fan_in_fan_out

    @property
    def dropout(self) -> nn.Module:
        return self.layer.lora_dropout[self.adapter_name]

    @property
    def scaling(self) -> float:
        """s: that of the config, times what `set_scale` has set."""
        return self.layer.scaling[self.adapter_name]

    @property
    def weights(self) -> Factors:
        """A and B as the modules hold them, wherever that is."""
        A, B = self.modules
        return A.weight, B.weight

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of the two factors that `fold` gives, as the modules say them."""
        A, B = self.modules
        return (A.out_features, A.in_features), (B.out_features, B.in_features)

    @property
    def estimate_shape(self) -> tuple[int, int]:
        """That of the matrix C_n, which is as A is in a merge."""
        return self.shapes[0]

    def hold(self, A: nn.Parameter, B: nn.Parameter) -> None:
        """Put other parameters in the place of A and B."""
        lora_a, lora_b = self.modules
        lora_a.weight, lora_b.weight = A, B

    def fold(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """The two factors of the update, matrices, of A and B as the modules hold them: these."""
        return A, B

    def in_use(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """The two factors of the update as the running forward pass has it; of most kinds, those of any update."""
        return self.fold(A, B)

    def weigh(self, hidden: torch.Tensor) -> torch.Tensor:
        """What B multiplies, of a hidden state `(..., r)`: in a forward pass, all that stands between A and B."""
        return hidden

    def start(self) -> None:
        """Make what a new adapter has besides the factors, which PEFT makes: nothing."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the block keeps in a checkpoint, by the names of the layer's attributes."""
        return dict(zip(self.factor_names, self.weights, strict=True))

    def held(self) -> tuple[torch.Tensor, ...]:
        """A and B, read also from where accelerate keeps what it has offloaded."""
        return tuple(held_tensor(module, "weight") for module in self.modules)

    def factors(self, name: str, advice: str) -> Factors:
        """The two factors of the update detached, read also from where accelerate keeps what it has offloaded.

        Args:
            name: the layer's, for the message.
            advice: what to do, for the message.

        Raises:
            RuntimeError: if they are sharded, or offloaded otherwise.
        """
        A, B = (readable(weight, name, advice) for weight in self.held())
        A, B = self.fold(A, B)
        return A.detach(), B.detach()

    def set_rank(self, rank: int) -> None:
        """Let the modules say the rank that their weights have."""
        A, B = self.modules
        A.out_features = B.in_features = rank

    @property
    def is_fused(self) -> bool:
        """Whether the layer may multiply by the weights of A and B itself, without a dropout: by `products`.

        Not where hooks, engines, transforms or torch's compiler have to see the calls of the modules.
        """
        if torch.compiler.is_compiling() or is_transformed():
            return False
        A, B = self.modules
        return is_plain(A) and is_plain(B) and is_inactive(self.dropout)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """A D(x), `(..., r)`."""
        if self.is_fused:
            return project(x, [self.weights[0]])[0]
        return self.project_dropped(self.dropout(x))

    def project_dropped(self, dropped: torch.Tensor) -> torch.Tensor:
        """A x, `(..., r)`, of an input that has been through the dropout."""
        A, _ = self.modules
        return A(dropped)

    def apply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """What `matrix`, as A is in a merge, makes of x in A's place, `(..., r)`."""
        return self.through_a(x, matrix.to(x.dtype))

    def through_a(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """What `matrix`, as `fold` gives A, makes of x in A's place, `(..., r)`."""
        return F.linear(x, matrix)

    def through_b(self, hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """What `matrix`, as `fold` gives B, makes of a hidden state in B's place, `(..., out_features)`."""
        return F.linear(hidden, matrix)

    def by_channel(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number for each direction or each output, so that it multiplies a hidden state or an output."""
        return numbers

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the base layer's shape as the matrix that B A is added to, both as `fold` gives them."""
        return self.layer.as_matrix(weight)

    def side_by_side(self, terms: Sequence[Term]) -> Factors:
        """The A_k below each other, and the s_k B_k side by side, whose product is the sum of theirs."""
        return torch.cat([A for A, _, _ in terms]), torch.cat([B * s for _, B, s in terms], dim=1)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """x as rows `(..., columns of A)` for which A x is a product of matrices: itself."""
        return x

    def project_sum(self, x: torch.Tensor, previous: torch.Tensor, sums: SharedSum | None) -> torch.Tensor:
        """A D(x + previous), `(..., r)`: Eq. 2.

        Args:
            sums: what the layers of one forward share of such sums.
        """
        A, _ = self.modules
        if not self.is_fused:
            return input_hidden(x, previous, self.dropout, A)
        dtype = working_dtype(x, A.weight)
        total = wide_sum(x, previous, dtype) if sums is None else sums(x, previous, dtype)
        if not torch.is_grad_enabled():
            return F.linear(total, A.weight)
        return ProjectedSum.apply(total, x, previous, A.weight, sums)

    def expand(self, hidden: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` plus s B `hidden`, weighed."""
        _, B = self.modules
        hidden = self.weigh(hidden)
        if is_plain(B):
            return add_update(result, hidden, B.weight, self.scaling)
        return result + B(hidden) * self.scaling

    def call(self, dropped: torch.Tensor) -> torch.Tensor:
        """B A `dropped`, by calls of the modules, whose hooks load them wherever they run."""
        A, B = self.modules
        return B(self.weigh(A(dropped).to(dropped.device)))

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        """`result` plus the sum of the s_k B_k A_k D(x): Eq. 3, in one product by A's side by side and one by B's."""
        factors_a = [A for A, _, _ in terms]
        hidden = project(x, [torch.cat(factors_a)])[0] if self.is_fused else block_hidden(x, factors_a, self.dropout)
        common = terms[0][2] if len({s for _, _, s in terms}) == 1 else 1.0
        B = torch.cat([B if s == common else B * s for _, B, s in terms], dim=1)
        return add_update(result, hidden, B, common)

    def delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """What merging the factors `A` and `B`, scaling included, adds to the base weight: `(out, in)`."""
        return B @ A

    def largest_entry(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """A bound on the entries of `delta`: |b_i . a_j| <= |b_i| |a_j|; not finite if a factor is not."""
        return float(torch.linalg.vector_norm(B, dim=1).max() * torch.linalg.vector_norm(A, dim=0).max())

    def merged(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
        """`weight`, in its own orientation, plus the merged update B A, rounded once."""
        left, right = (A.t(), B.t()) if self.transposed else (B, A)
        if weight.dtype != left.dtype or weight.device != left.device:
            weight = weight if in_place else weight.clone()
            return weight.add_((left @ right).to(weight.device))
        return weight.addmm_(left, right) if in_place else torch.addmm(weight, left, right)


def readable(weight: torch.Tensor, name: str, advice: str) -> torch.Tensor:
    """A factor, refused where it is not there to be read outside of its own layer's forward.

    Raises:
        RuntimeError: if it is sharded or offloaded; it names the layer and ends with `advice`.
    """
    if not is_readable(weight):
        raise RuntimeError(f"The LoRA factors of layer {name!r} are {NOT_HERE} outside of its forward pass. {advice}")
    return weight


def is_plain(linear: nn.Module) -> bool:
    """Whether a call of `linear` does nothing but multiply by its weight: no hooks, no wrapped forward, no sharding.

    Offloading and sharding engines act on calls of the modules that hold A and B.
    """
    return is_bare_linear(linear) and not isinstance(linear.weight, DTensor)


def is_inactive(dropout: nn.Module) -> bool:
    """Whether a dropout lets everything through."""
    return isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not dropout.training)


class ProjectedSum(torch.autograd.Function):
    """A `total`, where total = x + previous, saving x and previous in its place.

    Layers with a common input have in common what they save, then, and as much as in LoRA: their inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        x: torch.Tensor,
        previous: torch.Tensor,
        factor_a: torch.Tensor,
        sums: SharedSum | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, previous, factor_a)
        ctx.first_in_chain = previous is x
        ctx.sums, ctx.dtype = sums, total.dtype
        return F.linear(total, factor_a)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, previous, factor_a = ctx.saved_tensors
        grad_total = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_total = (grad @ factor_a.to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            # With a graph of the backward, the sum would hold what holds it.
            alone = ctx.sums is None or torch.is_grad_enabled()
            total = wide_sum(x, previous, ctx.dtype) if alone else ctx.sums(x, previous, ctx.dtype)
            grad_a = (rows_of(grad).t() @ rows_of(total).to(grad.dtype)).to(factor_a.dtype)
        if ctx.first_in_chain and ctx.sums is not None:
            ctx.sums.forget()
        return grad_total, None, None, grad_a, None


def add_update(result: torch.Tensor, hidden: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + scaling * hidden @ B.T, in one pass over the output and in its dtype where the dtypes allow it.

    Args:
        result: the base layer's output `(..., out_features)`.
        hidden: `(..., r)`.
        factor_b: B, `(out_features, r)`.
    """
    fits = result.dtype == hidden.dtype or (result.dtype in HALVES and hidden.dtype == torch.float32)
    if not fits or _is_narrowed(result) or torch.compiler.is_compiling() or is_transformed():
        return result + F.linear(hidden, factor_b) * scaling
    return expand(result, hidden, factor_b, scaling)


def _is_narrowed(result: torch.Tensor) -> bool:
    """Whether autocast would round `result` to be added to, such as an embedding's, which it leaves in float32."""
    return autocasts(result) and result.dtype != torch.get_autocast_dtype(result.device.type)
