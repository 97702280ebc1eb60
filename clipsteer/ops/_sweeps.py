"""The sweeps over similarities that the contrastive losses consist of.

A first one takes the log-sums of rows and columns, a second one the weights, which give the
gradients; what lies between them is each loss's own. All have a block of rows against all columns,
so that several processes can share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._dispatch import call

# Similarities are kept between the two sweeps on a CPU while they take no more than so many copies
# of the features.
KEEP = 2


def _plain_sides(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
) -> tuple[Tensor, Tensor]:
    """t (M, N), image and text side; row m is the partner of column offset + m, where t is -inf."""
    S = rows.to(diag.dtype) @ cols.to(diag.dtype).T
    own = torch.zeros_like(S, dtype=torch.bool)
    own.diagonal(offset).fill_(True)
    image = (S - diag[offset : offset + len(rows)].unsqueeze(1)) * scale
    text = (S - diag) * scale
    return image.masked_fill(own, -torch.inf), text.masked_fill(own, -torch.inf)


def _plain_sums(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ exp t of every row (M,), and of every column over the rows here (N,)."""
    image, text = _plain_sides(rows, cols, diag, scale, offset)
    return image.logsumexp(1), text.logsumexp(0), image[:0]


def _plain_grad(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
    row_u: Tensor,  # (M,)
    col_u: Tensor,  # (N,)
    own: Tensor,  # (M,)
    kept: Tensor,  # unused: similarities are made anew
    width: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """w (M, N) = exp(t − u) of both sides, own on the partners: w·cols, wᵀ·rows (their first
    ``width``), Σ w·t."""
    image, text = _plain_sides(rows, cols, diag, scale, offset)
    w_image = (image - row_u.unsqueeze(1)).exp()
    w_text = (text - col_u).exp()
    moment = (w_image * image.nan_to_num(neginf=0.0)).sum()
    moment = moment + (w_text * text.nan_to_num(neginf=0.0)).sum()
    w = w_image + w_text
    w.diagonal(offset).copy_(own)
    d_rows = w @ cols[:, :width].to(w.dtype)
    d_cols = w.T @ rows[:, :width].to(w.dtype)
    return d_rows, d_cols, moment


def _plain_siglip(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    offset: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (3,) of −log σ(±z), of w·S and of w, for z = S·scale + bias, σ's weights w (M, N) with
    the partners' sign; w·cols, wᵀ·rows."""
    S = rows.to(scale.dtype) @ cols.to(scale.dtype).T
    sign = torch.ones_like(S)
    sign.diagonal(offset).fill_(-1)
    z = sign * (S * scale + bias)
    w = sign * torch.sigmoid(z)
    sums = torch.stack([-F.logsigmoid(-z).sum(), (w * S).sum(), w.sum()])
    return sums, w @ cols.to(w.dtype), w.T @ rows.to(w.dtype)


def _plain_distill_sums(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    teacher_rows: Tensor,  # (M, E)
    teacher_cols: Tensor,  # (N, E)
    teacher_diag: Tensor,  # (N,)
    teacher_scale: Tensor,  # ()
    offset: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows (4, M) and of columns (4, N): log-sums of the student and of the teacher, means of
    the student's t under the student's weights and under the teacher's."""
    student = _plain_sides(rows, cols, diag, scale, offset)
    teacher = _plain_sides(teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset)
    found = []
    for dim, t, r in zip((1, 0), student, teacher):
        sums = [t.logsumexp(dim), r.logsumexp(dim)]
        for x in (t, r):
            p = x.softmax(dim).nan_to_num(0.0) if x.shape[dim] < 2 else x.softmax(dim)
            sums.append(torch.where(p == 0, 0.0, p * t).sum(dim))
        found.append(torch.stack(sums))
    return found[0], found[1], student[0][:0], student[0][:0]


def _plain_distill_grad(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    teacher_rows: Tensor,  # (M, E)
    teacher_cols: Tensor,  # (N, E)
    teacher_diag: Tensor,  # (N,)
    teacher_scale: Tensor,  # ()
    offset: int,
    row_u: Tensor,  # (2, M), of the student and of the teacher
    col_u: Tensor,  # (2, N)
    own: Tensor,  # (M,)
    factors: Tensor,  # (2,)
    kept: Tensor,  # unused: similarities are made anew
    teacher_kept: Tensor,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor]:
    """With w = exp(t − u) of both sides, of the student's and of the teacher's, and own on the
    partners: f·w − g·v times cols, its transpose times rows."""
    student = _plain_sides(rows, cols, diag, scale, offset)
    teacher = _plain_sides(teacher_rows, teacher_cols, teacher_diag, teacher_scale, offset)
    w = []
    for k, (image, text) in enumerate((student, teacher)):
        w.append((image - row_u[k].unsqueeze(1)).exp() + (text - col_u[k]).exp())
    P = factors[0] * w[0] - factors[1] * w[1]
    P.diagonal(offset).copy_(own)
    return P @ cols.to(P.dtype), P.T @ rows.to(P.dtype)


PLAIN: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "drrho_sums": _plain_sums,
    "drrho_grad": _plain_grad,
    "siglip_sweep": _plain_siglip,
    "distill_sums": _plain_distill_sums,
    "distill_grad": _plain_distill_grad,
}


def low_level(backend: str, op: str, *args: Any) -> Any:
    """A sweep of a backend."""
    if backend == "reference":
        return PLAIN[op](*args)
    return call(backend, op, *args)


def in_one_call(backend: str, world: Any) -> bool:
    """Whether C++ has what the sweeps add up to, and what lies between them: small batches would
    spend most of their time on that."""
    return backend == "cpp" and world is None


def keeps(rows: Tensor, columns: int, width: int) -> bool:
    """Whether similarities of so many columns, of features of this width, stay between sweeps."""
    if rows.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    M = rows.shape[0]
    # last, as it says something of the batch, which an exported graph would keep to
    return KEEP * (M + columns) * width >= M * columns


class Pairs:
    """Rows of a process, here, against the columns of all, and what is theirs of either: the
    softmaxes of both sides, relative to each one's own pair."""

    def __init__(
        self,
        rows: Tensor,  # (M, D)
        cols: Tensor,  # (M, D), of this process
        scale: Tensor,  # (), at least float32
        backend: str,
        world: Any,
        diag: Tensor | None = None,  # (N,), of an earlier call with these
    ) -> None:
        self.rows = rows.contiguous()
        self.cols = cols.contiguous()
        self.scale = scale
        self.backend = backend
        self.world = world
        self.offset = 0
        if diag is None:
            diag = self.joined((self.rows.to(scale.dtype) * self.cols.to(scale.dtype)).sum(1))
        self.diag = diag
        if world is not None:
            self.offset = world.offset
            self.cols = world.join(self.cols)
        self.columns = self.cols.shape[0]
        self.mine = slice(self.offset, self.offset + self.rows.shape[0])

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a sweep takes of them."""
        return self.rows, self.cols, self.diag, self.scale

    def log_sums(self, keep: bool) -> tuple[Tensor, Tensor]:
        """log Σ exp t over the other pairs, both sides (2, M); similarities to keep."""
        given = (*self.features, self.offset, keep)
        row_lse, col_lse, kept = low_level(self.backend, "drrho_sums", *given)
        if self.world is not None:
            col_lse = self.world.logsumexp(col_lse)[self.mine]
        return torch.stack([row_lse, col_lse]), kept

    def joined(
        self,
        x: Tensor,  # (M, ...)
    ) -> Tensor:  # (N, ...)
        """Of all columns, of which each process has its own."""
        return x if self.world is None else self.world.join(x)

    def own_columns(
        self,
        d_cols: Tensor,  # (N, d), what the rows here make of them
        needed: bool,
    ) -> Tensor:  # (M, d)
        """Gradients of the columns of this process, complete."""
        if self.world is None or not needed:
            return d_cols
        return self.world.sum_(d_cols)[self.mine]

    def gradients(
        self,
        u: Tensor,  # (2, M)
        own: Tensor,  # (M,)
        kept: Tensor,
        width: int,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights exp(t − u) of both sides, own on the partners: their products with texts and with
        images (M, width), Σ w·t () of all processes in float64."""
        row_u, col_u = u.unbind()
        d_rows, d_cols, moment = low_level(
            self.backend,
            "drrho_grad",
            *self.features,
            self.offset,
            row_u.contiguous(),
            self.joined(col_u).contiguous(),
            own,
            kept,
            width,
            needs[0],
            needs[1],
        )
        moment = moment.double()
        if self.world is not None:
            moment = self.world.sum_(moment)
        return d_rows, self.own_columns(d_cols, needs[1]), moment
