"""Recurrent, attention and graph models written with torch alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Case, Entry, case, image, source


class Recurrent(nn.Module):
    """Linear, recurrent layers, linear: the widths on both sides of the recurrence can shrink."""

    def __init__(self, kind: str, layers: int, both: bool = False, proj: int = 0, final: bool = False) -> None:
        """Build from the name of the recurrent class; `final` reads the last hidden state, not the sequence."""
        super().__init__()
        extra = {"proj_size": proj} if proj else {}
        self.inp = nn.Linear(5, 6)
        self.rnn = getattr(nn, kind)(6, 7, num_layers=layers, batch_first=True, bidirectional=both, **extra)
        self.out = nn.Linear((proj or 7) * (2 if both and not final else 1), 3)
        self.final = final

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 5) to (batch, time, 3), or to (batch, 3)."""
        seq, state = self.rnn(F.relu(self.inp(x)))
        if self.final:
            state = state[0] if isinstance(state, tuple) else state
            return self.out(state[-1])
        return self.out(seq)


class Attend(nn.Module):
    """A residual self- or cross-attention block around nn.MultiheadAttention."""

    def __init__(
        self, weights: bool = False, kdim: int | None = None, mask: bool = False, batch_first: bool = True
    ) -> None:
        """Three heads of four; `weights` also returns the attention map, `kdim` attends to other features."""
        super().__init__()
        self.inp = nn.Linear(5, 12)
        self.mha = nn.MultiheadAttention(12, 3, batch_first=batch_first, kdim=kdim, vdim=kdim and kdim + 1)
        self.key = nn.Linear(5, kdim) if kdim else None
        self.val = nn.Linear(5, kdim + 1) if kdim else None
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 2)
        self.weights, self.mask = weights, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(batch, length, 5) to (batch, length, 2)."""
        h = self.inp(x)
        k = self.key(x) if self.key is not None else h
        v = self.val(x) if self.val is not None else h
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1) if self.mask else None
        a, w = self.mha(h, k, v, need_weights=self.weights, attn_mask=mask)
        y = self.out(self.norm(h + a))
        return (y, w) if self.weights else y


class Encoder(nn.Module):
    """nn.TransformerEncoder between two linear layers."""

    def __init__(self, first: bool, activation: str = "gelu") -> None:
        """`first`: normalise before attention rather than after."""
        super().__init__()
        self.inp = nn.Linear(5, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=first, activation=activation)
        self.enc = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12) if first else None, enable_nested_tensor=False)
        self.out = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, 5) to (batch, 4), averaged over the positions."""
        return self.out(self.enc(self.inp(x)).mean(1))


class Seq2Seq(nn.Module):
    """nn.Transformer: encoder, decoder with cross attention."""

    def __init__(self) -> None:
        """One width for both sides, three heads."""
        super().__init__()
        self.src, self.tgt = nn.Linear(5, 12), nn.Linear(4, 12)
        self.body = nn.Transformer(12, 3, 1, 1, 20, batch_first=True)
        self.out = nn.Linear(12, 2)

    def forward(self, src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        """(batch, s, 5) and (batch, t, 4) to (batch, t, 2)."""
        return self.out(self.body(self.src(src), self.tgt(tgt)))


class EdgeConv(nn.Module):
    """Edge convolution of DGCNN: neighbours by k nearest points in feature space, maximum over them."""

    def __init__(self, cin: int, cout: int, k: int) -> None:
        """Features in, features out, neighbours."""
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2 * cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2))
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, features, points) to (batch, features, points)."""
        b, c, n = x.shape
        inner = x.transpose(1, 2) @ x
        square = (x * x).sum(1)
        distance = 2 * inner - square[:, :, None] - square[:, None, :]
        idx = distance.topk(self.k, dim=-1)[1]
        base = torch.arange(b)[:, None, None] * n
        points = x.transpose(1, 2).reshape(b * n, c)
        near = points[(idx + base).reshape(-1)].view(b, n, self.k, c)
        here = x.transpose(1, 2).unsqueeze(2).expand(-1, -1, self.k, -1)
        edge = torch.cat([near - here, here], 3).permute(0, 3, 1, 2)
        return self.conv(edge).amax(-1)


class DGCNN(nn.Module):
    """Dynamic graph CNN for point clouds: edge convolutions, concat of levels, global pooling, classifier."""

    def __init__(self) -> None:
        """Two edge convolutions of different widths."""
        super().__init__()
        self.a, self.b = EdgeConv(3, 6, 4), EdgeConv(6, 9, 4)
        self.mix = nn.Sequential(nn.Conv1d(15, 11, 1, bias=False), nn.BatchNorm1d(11), nn.LeakyReLU(0.2))
        self.head = nn.Sequential(nn.Linear(22, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, points) to (batch, 5)."""
        a = self.a(x)
        b = self.b(a)
        h = self.mix(torch.cat([a, b], 1))
        return self.head(torch.cat([h.amax(-1), h.mean(-1)], 1))


class GATLayer(nn.Module):
    """Graph attention with an edge list: scores by a vector per head, softmax over each node's in-edges."""

    def __init__(self, cin: int, heads: int, dim: int) -> None:
        """Input features, heads, features per head."""
        super().__init__()
        self.lin = nn.Linear(cin, heads * dim, bias=False)
        self.src = nn.Parameter(torch.zeros(1, heads, dim))
        self.dst = nn.Parameter(torch.zeros(1, heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads * dim))
        self.heads, self.dim = heads, dim

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """(nodes, features) and (2, edges) to (nodes, heads * dim)."""
        n = x.shape[0]
        h = self.lin(x).view(-1, self.heads, self.dim)
        score = (h * self.src).sum(-1)[edges[0]] + (h * self.dst).sum(-1)[edges[1]]
        weight = F.leaky_relu(score, 0.2).exp()
        total = torch.zeros(n, self.heads).index_add(0, edges[1], weight)
        weight = weight / total[edges[1]].clamp(min=1e-6)
        out = torch.zeros(n, self.heads, self.dim).index_add(0, edges[1], h[edges[0]] * weight.unsqueeze(-1))
        return out.flatten(1) + self.bias


class GAT(nn.Module):
    """Two graph attention layers, the second with one head."""

    def __init__(self) -> None:
        """Four input features, 3 heads of 5, 6 classes."""
        super().__init__()
        self.a, self.b = GATLayer(4, 3, 5), GATLayer(15, 1, 6)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Node features and edge list to class scores per node."""
        return self.b(F.elu(self.a(x, edges)), edges)


class GCN(nn.Module):
    """Two graph convolutions with a dense normalised adjacency and a residual."""

    def __init__(self) -> None:
        """4 features, width 7, 3 classes."""
        super().__init__()
        self.inp, self.a, self.b = nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, adj: torch.Tensor) -> torch.Tensor:
        """(batch, nodes, 4) and (batch, nodes, nodes) to (batch, nodes, 3)."""
        h = F.relu(adj @ self.inp(x))
        h = h + F.relu(adj @ self.a(h))
        return adj @ self.b(h)


class PointNet(nn.Module):
    """Shared per-point layers, a learned input transform, maximum over the points."""

    def __init__(self) -> None:
        """3 coordinates, widths 6, 9, 5 classes."""
        super().__init__()
        self.t = nn.Sequential(nn.Conv1d(3, 7, 1), nn.BatchNorm1d(7), nn.ReLU())
        self.tfc = nn.Linear(7, 9)
        self.a = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU())
        self.b = nn.Sequential(nn.Conv1d(6, 10, 1), nn.BatchNorm1d(10), nn.ReLU())
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, points) to (batch, 5)."""
        t = self.tfc(self.t(x).amax(-1)).view(-1, 3, 3)
        x = (x.transpose(1, 2) @ t).transpose(1, 2)
        return self.head(self.b(self.a(x)).amax(-1))


def _sequence(model: Callable[[], nn.Module]) -> Callable[[], Case]:
    """A case with inputs (batch, 7, 5)."""
    return lambda: case(model(), lambda b: torch.randn(b, 7, 5, generator=source(b)))


def _lstm() -> Case:
    """The bare nn.LSTM with its tuple output."""
    return case(
        nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True),
        lambda b: torch.randn(b, 7, 5, generator=source(b)),
    )


def _bare_mha() -> Case:
    """The bare nn.MultiheadAttention, features at input and output."""

    def make(b: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(b, 7, 12, generator=source(b))
        return x, x + 0.1, x * 0.9

    return case(nn.MultiheadAttention(12, 3, batch_first=True), make)


def _seq2seq() -> Case:
    """Encoder and decoder inputs of different lengths."""
    return case(
        Seq2Seq(), lambda b: (torch.randn(b, 7, 5, generator=source(b)), torch.randn(b, 6, 4, generator=source(b + 9)))
    )


def _graph(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random graph in which every node has an in-edge."""
    gen = source(nodes)
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    more = torch.randint(0, nodes, (2, 2 * nodes), generator=gen)
    return torch.randn(nodes, 4, generator=gen), torch.cat([ring, more], 1)


def _gat() -> Case:
    """Nodes and edges are both dynamic; there is no batch."""
    dyn = torch.export.Dim.DYNAMIC
    return case(GAT(), lambda b: _graph(4 * b + 1), dynamic={"x": {0: dyn}, "edges": {1: dyn}})


def _gcn() -> Case:
    """Dense adjacency with rows that sum to one."""
    return case(
        GCN(),
        lambda b: (torch.randn(b, 6, 4, generator=source(b)), torch.rand(b, 6, 6, generator=source(b + 9)).softmax(-1)),
    )


ENTRIES: list[Entry] = [
    Entry("lstm_1", "torch", _sequence(lambda: Recurrent("LSTM", 1))),
    Entry("lstm_2", "torch", _sequence(lambda: Recurrent("LSTM", 2))),
    Entry("lstm_bi_1", "torch", _sequence(lambda: Recurrent("LSTM", 1, both=True))),
    Entry("lstm_bi_2", "torch", _sequence(lambda: Recurrent("LSTM", 2, both=True))),
    Entry("lstm_final", "torch", _sequence(lambda: Recurrent("LSTM", 2, final=True)), note="last hidden state"),
    Entry("lstm_proj", "torch", _sequence(lambda: Recurrent("LSTM", 1, proj=4)), note="projected hidden state"),
    Entry("lstm_bare", "torch", _lstm, note="input and output features are the program's"),
    Entry("gru_1", "torch", _sequence(lambda: Recurrent("GRU", 1))),
    Entry("gru_2", "torch", _sequence(lambda: Recurrent("GRU", 2))),
    Entry("gru_bi_2", "torch", _sequence(lambda: Recurrent("GRU", 2, both=True))),
    Entry("rnn_2", "torch", _sequence(lambda: Recurrent("RNN", 2))),
    Entry("mha_bare", "torch", _bare_mha),
    Entry("mha", "torch", _sequence(Attend)),
    Entry("mha_weights", "torch", _sequence(lambda: Attend(weights=True)), note="bmm and softmax, no sdpa"),
    Entry("mha_kdim", "torch", _sequence(lambda: Attend(kdim=9)), note="separate projection weights"),
    Entry("mha_mask", "torch", _sequence(lambda: Attend(mask=True))),
    Entry("transformer_encoder", "torch", _sequence(lambda: Encoder(False))),
    Entry("transformer_encoder_pre", "torch", _sequence(lambda: Encoder(True, "relu"))),
    Entry("transformer_full", "torch", _seq2seq),
    Entry("dgcnn", "torch", lambda: case(DGCNN(), lambda b: image(b, 3, 12))),
    Entry("gat", "torch", _gat, float64=False),
    Entry("gcn", "torch", _gcn),
    Entry("pointnet", "torch", lambda: case(PointNet(), lambda b: image(b, 3, 12))),
]
