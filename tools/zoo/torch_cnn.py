"""Hand-written convolutional networks, one class per topology, tiny and with distinct widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Entry, case, image


def cbr(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Module:
    """Convolution, batch norm, activation (ReLU unless given)."""
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU() if act is None else act,
    )


class Classifier(nn.Module):
    """A body, global average pooling and a linear head."""

    def __init__(self, body: nn.Module, width: int, classes: int = 5) -> None:
        """`width`: channels that leave the body."""
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to (batch, classes)."""
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


class Basic(nn.Module):
    """The two-convolution residual block, with a projection where the shape changes."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int = 1) -> None:
        """Widths in, inside, out."""
        super().__init__()
        self.a = cbr(cin, mid, stride=stride)
        self.b = cbr(mid, cout, act=nn.Identity())
        same = cin == cout and stride == 1
        self.skip = nn.Identity() if same else cbr(cin, cout, 1, stride, act=nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add and rectify."""
        return F.relu(self.b(self.a(x)) + self.skip(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (possibly grouped), 1x1, residual: ResNet-50, ResNeXt and RegNet blocks."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int = 1, groups: int = 1, squeeze: int = 0) -> None:
        """`squeeze`: width of a squeeze-and-excite inside, as in RegNetY."""
        super().__init__()
        self.a, self.b = cbr(cin, mid, 1), cbr(mid, mid, 3, stride, groups)
        self.se = Squeeze(mid, squeeze) if squeeze else nn.Identity()
        self.c = cbr(mid, cout, 1, act=nn.Identity())
        same = cin == cout and stride == 1
        self.skip = nn.Identity() if same else cbr(cin, cout, 1, stride, act=nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add and rectify."""
        return F.relu(self.c(self.se(self.b(self.a(x)))) + self.skip(x))


class Squeeze(nn.Module):
    """Squeeze-and-excite with convolutions."""

    def __init__(self, width: int, mid: int, hard: bool = False) -> None:
        """`hard`: piecewise linear gate of MobileNetV3."""
        super().__init__()
        self.down, self.up, self.hard = nn.Conv2d(width, mid, 1), nn.Conv2d(mid, width, 1), hard

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels."""
        g = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * (F.hardsigmoid(g) if self.hard else g.sigmoid())


class Inverted(nn.Module):
    """Inverted residual: expand, depthwise, optional squeeze, project (MobileNetV2/V3, EfficientNet)."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int = 1, act: str = "ReLU6", squeeze: int = 0) -> None:
        """`act` names the activation class."""
        super().__init__()
        make = getattr(nn, act)
        self.body = nn.Sequential(
            cbr(cin, mid, 1, act=make()) if mid != cin else nn.Identity(),
            cbr(mid, mid, 3, stride, mid, act=make()),
            Squeeze(mid, squeeze, act == "Hardswish") if squeeze else nn.Identity(),
            cbr(mid, cout, 1, act=nn.Identity()),
        )
        self.same = cin == cout and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear bottleneck: no activation after the addition."""
        return self.body(x) + x if self.same else self.body(x)


class Dense(nn.Module):
    """DenseNet: every layer sees the concat of all earlier ones; a transition between the blocks."""

    def __init__(self) -> None:
        """Stem 8, growth 5, two blocks."""
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.one = nn.ModuleList([self.layer(8, 5), self.layer(13, 5)])
        self.move = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1, bias=False), nn.AvgPool2d(2))
        self.two = nn.ModuleList([self.layer(9, 5), self.layer(14, 5)])
        self.norm = nn.BatchNorm2d(19)

    @staticmethod
    def layer(cin: int, growth: int) -> nn.Module:
        """Norm, 1x1 to 4 growth rates (here 12), norm, 3x3 to the growth rate."""
        return nn.Sequential(
            nn.BatchNorm2d(cin),
            nn.ReLU(),
            nn.Conv2d(cin, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (batch, 19, height, width)."""
        x = self.stem(x)
        for layer in self.one:
            x = torch.cat([x, layer(x)], 1)
        x = self.move(x)
        for layer in self.two:
            x = torch.cat([x, layer(x)], 1)
        return F.relu(self.norm(x))


class Shuffle(nn.Module):
    """The ShuffleNetV2 unit: half the channels pass by, then the halves are interleaved."""

    def __init__(self, cin: int, branch: int, stride: int) -> None:
        """`branch`: half of the output width."""
        super().__init__()
        first = cin if stride > 1 else branch
        self.right = nn.Sequential(
            cbr(first, branch, 1), cbr(branch, branch, 3, stride, branch, nn.Identity()), cbr(branch, branch, 1)
        )
        self.left = (
            nn.Sequential(cbr(cin, cin, 3, stride, cin, nn.Identity()), cbr(cin, branch, 1)) if stride > 1 else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate and shuffle in two groups."""
        if self.left is not None:
            y = torch.cat([self.left(x), self.right(x)], 1)
        else:
            keep, work = x.chunk(2, dim=1)
            y = torch.cat([keep, self.right(work)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Res2(nn.Module):
    """Res2Net bottleneck: the channels in four parts, each added to the next before its convolution."""

    def __init__(self, cin: int, part: int, cout: int) -> None:
        """`part`: width of one of the four parts."""
        super().__init__()
        self.a = cbr(cin, 4 * part, 1)
        self.mid = nn.ModuleList([cbr(part, part) for _ in range(3)])
        self.c = cbr(4 * part, cout, 1, act=nn.Identity())
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual without projection: widths in and out agree."""
        parts = torch.split(self.a(x), self.part, 1)
        out: list[torch.Tensor] = []
        for i, conv in enumerate(self.mid):
            out.append(conv(parts[i] if i == 0 else parts[i] + out[-1]))
        return F.relu(self.c(torch.cat([*out, parts[3]], 1)) + x)


class C2f(nn.Module):
    """YOLOv8's block: two halves, bottlenecks after each other on the second, all concatenated."""

    def __init__(self, cin: int, half: int, cout: int, blocks: int = 2) -> None:
        """`half`: width of one half."""
        super().__init__()
        self.a, self.c = cbr(cin, 2 * half, 1, act=nn.SiLU()), cbr((2 + blocks) * half, cout, 1, act=nn.SiLU())
        self.m = nn.ModuleList(
            [nn.Sequential(cbr(half, half, act=nn.SiLU()), cbr(half, half, act=nn.SiLU())) for _ in range(blocks)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every bottleneck has its own shortcut."""
        y = list(self.a(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.c(torch.cat(y, 1))


class SPPF(nn.Module):
    """YOLO's pooling pyramid: three max pools in a row, all concatenated."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        """Widths."""
        super().__init__()
        self.a, self.c = cbr(cin, mid, 1, act=nn.SiLU()), cbr(4 * mid, cout, 1, act=nn.SiLU())
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The concat holds the same channels four times."""
        x = self.a(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.c(torch.cat([x, y, z, self.pool(z)], 1))


class Inception(nn.Module):
    """Four parallel branches, concatenated."""

    def __init__(self, cin: int) -> None:
        """Branches of 3, 5, 4 and 2 channels."""
        super().__init__()
        self.a = cbr(cin, 3, 1)
        self.b = nn.Sequential(cbr(cin, 6, 1), cbr(6, 5))
        self.c = nn.Sequential(cbr(cin, 7, 1), cbr(7, 4, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(cin, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels 3 + 5 + 4 + 2 = 14."""
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


class VGG(nn.Module):
    """Plain convolutions, flattened into a linear layer."""

    def __init__(self) -> None:
        """Widths 6, 9, 10; 16 by 16 pixels, 4 by 4 at the flatten."""
        super().__init__()
        self.features = nn.Sequential(cbr(3, 6), nn.MaxPool2d(2), cbr(6, 9), nn.MaxPool2d(2), cbr(9, 10))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(160, 11), nn.ReLU(), nn.Dropout(), nn.Linear(11, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, 16, 16) to (batch, 5)."""
        return self.classifier(self.features(x))


class PlainUNet(nn.Module):
    """Convolutional U-Net with transposed convolutions, skip concats, batch or group norm."""

    def __init__(self, group: bool = False) -> None:
        """`group`: group norm over the skip concats, with group borders inside the parts."""
        super().__init__()
        norm = (lambda c: nn.GroupNorm(4, c)) if group else nn.BatchNorm2d

        def block(cin: int, cout: int) -> nn.Module:
            return nn.Sequential(norm(cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))

        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.d1, self.d2 = block(8, 12), block(12, 20)
        self.down1, self.down2 = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(12, 12, 3, 2, 1)
        self.up2, self.up1 = nn.ConvTranspose2d(20, 16, 2, 2), nn.ConvTranspose2d(12, 12, 2, 2)
        self.u2, self.u1 = block(28, 12), block(20, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, h, w) to (batch, 2, h, w)."""
        a = self.stem(x)
        b = self.d1(self.down1(a))
        c = self.d2(self.down2(b))
        y = self.u2(torch.cat([self.up2(c), b], 1))
        return self.out(self.u1(torch.cat([self.up1(y), a], 1)))


class Pyramid(nn.Module):
    """Feature pyramid with lateral convolutions and several outputs."""

    def __init__(self) -> None:
        """Levels of 6, 9 and 11 channels, pyramid width 7."""
        super().__init__()
        self.c1, self.c2, self.c3 = cbr(3, 6), cbr(6, 9, stride=2), cbr(9, 11, stride=2)
        self.l1, self.l2, self.l3 = nn.Conv2d(6, 7, 1), nn.Conv2d(9, 7, 1), nn.Conv2d(11, 7, 1)
        self.head = nn.Conv2d(7, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Three maps from one shared head."""
        a = self.c1(x)
        b = self.c2(a)
        c = self.c3(b)
        r = self.l3(c)
        q = self.l2(b) + F.interpolate(r, scale_factor=2.0, mode="nearest")
        p = self.l1(a) + F.interpolate(q, scale_factor=2.0, mode="nearest")
        return [self.head(p), self.head(q), self.head(r)]


class SuperResolution(nn.Module):
    """Residual convolutions and pixel shuffle."""

    def __init__(self) -> None:
        """Width 6, factor 2, twice."""
        super().__init__()
        self.inp, self.a, self.b = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 9, 3, padding=1),
            nn.Conv2d(9, 6, 3, padding=1),
        )
        self.up, self.out = nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, h, w) to (batch, 3, 2h, 2w)."""
        h = self.inp(x)
        h = h + self.b(F.leaky_relu(self.a(h), 0.2))
        return self.out(F.pixel_shuffle(self.up(h), 2))


class Wave(nn.Module):
    """Dilated gated 1-D convolutions with residual and skip paths (WaveNet)."""

    def __init__(self) -> None:
        """Residual width 6, gate width 8, skip width 5."""
        super().__init__()
        self.inp = nn.Conv1d(2, 6, 1)
        self.gate = nn.ModuleList([nn.Conv1d(6, 16, 3, padding=d, dilation=d) for d in (1, 2)])
        self.res = nn.ModuleList([nn.Conv1d(8, 6, 1) for _ in range(2)])
        self.skip = nn.ModuleList([nn.Conv1d(8, 5, 1) for _ in range(2)])
        self.out = nn.Conv1d(5, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 2, time) to (batch, 3, time)."""
        h = self.inp(x)
        total = torch.zeros(1)
        for gate, res, skip in zip(self.gate, self.res, self.skip, strict=True):
            a, b = gate(h).chunk(2, 1)
            g = a.tanh() * b.sigmoid()
            h, total = h + res(g), total + skip(g)
        return self.out(F.relu(total))


class Video(nn.Module):
    """3-D convolutions, one split into space and time."""

    def __init__(self) -> None:
        """Widths 6, 8, 9."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.ReLU(),
            nn.Conv3d(8, 9, (3, 1, 1), padding=(1, 0, 0)),
            nn.ReLU(),
        )
        self.head = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, time, height, width) to (batch, 5)."""
        return self.head(self.body(x).mean((2, 3, 4)))


def _net(*layers: nn.Module, width: int) -> nn.Module:
    """A classifier around layers in sequence."""
    return Classifier(nn.Sequential(*layers), width)


def _entry(name: str, model: Callable[[], nn.Module], size: int = 16, note: str = "") -> Entry:
    """An entry with image inputs (batch, 3, size, size)."""
    return Entry(name, "torch", lambda: case(model(), lambda b: image(b, 3, size, size)), note=note)


ENTRIES: list[Entry] = [
    _entry("resnet_basic", lambda: _net(cbr(3, 6), Basic(6, 7, 6), Basic(6, 9, 10, 2), Basic(10, 11, 10), width=10)),
    _entry(
        "resnet_bottleneck",
        lambda: _net(cbr(3, 6), Bottleneck(6, 5, 12), Bottleneck(12, 5, 12), Bottleneck(12, 7, 20, 2), width=20),
    ),
    _entry(
        "resnext",
        lambda: _net(cbr(3, 6), Bottleneck(6, 12, 14, groups=4), Bottleneck(14, 12, 14, groups=4), width=14),
        note="4 groups of 3",
    ),
    _entry(
        "regnet_y",
        lambda: _net(cbr(3, 6), Bottleneck(6, 10, 10, 2, 2, 3), Bottleneck(10, 10, 10, 1, 2, 3), width=10),
        note="2 groups of 5, squeeze 3",
    ),
    _entry("res2net", lambda: _net(cbr(3, 9), Res2(9, 5, 9), Res2(9, 4, 9), width=9)),
    _entry("densenet", lambda: _net(Dense(), width=19)),
    _entry("shufflenet_v2", lambda: _net(cbr(3, 6), Shuffle(6, 5, 2), Shuffle(10, 5, 1), Shuffle(10, 5, 1), width=10)),
    _entry(
        "mobilenet_v2",
        lambda: _net(
            cbr(3, 6, act=nn.ReLU6()),
            Inverted(6, 6, 5),
            Inverted(5, 12, 7, 2),
            Inverted(7, 15, 7),
            cbr(7, 20, 1, act=nn.ReLU6()),
            width=20,
        ),
    ),
    _entry(
        "mobilenet_v3",
        lambda: _net(
            cbr(3, 6, act=nn.Hardswish()),
            Inverted(6, 11, 7, 2, "Hardswish", 4),
            Inverted(7, 15, 7, 1, "Hardswish", 5),
            cbr(7, 20, 1, act=nn.Hardswish()),
            width=20,
        ),
    ),
    _entry(
        "efficientnet",
        lambda: _net(
            cbr(3, 6, act=nn.SiLU()),
            Inverted(6, 6, 5, 1, "SiLU", 3),
            Inverted(5, 12, 7, 2, "SiLU", 4),
            Inverted(7, 15, 7, 1, "SiLU", 4),
            width=7,
        ),
    ),
    _entry("c2f", lambda: _net(cbr(3, 6), C2f(6, 5, 9), SPPF(9, 4, 11), width=11)),
    _entry("inception", lambda: _net(cbr(3, 8), Inception(8), cbr(14, 10), width=10)),
    _entry("vgg", VGG),
    _entry("unet_plain", PlainUNet),
    _entry("unet_group", lambda: PlainUNet(True), note="group norm across skip concats"),
    _entry("pyramid", Pyramid),
    _entry("super_resolution", SuperResolution),
    Entry("wavenet", "torch", lambda: case(Wave(), lambda b: image(b, 2, 20))),
    Entry("video3d", "torch", lambda: case(Video(), lambda b: image(b, 3, 4, 8, 8))),
]
