"""mmsegmentation's FCN and SegFormer in plain PyTorch, with its names, for comparisons.

mmsegmentation itself needs a build of mmcv. These follow its description: the state dicts have the names and shapes of its
published files, which tests/weights/test_formats_pixel_classifiers.py compares with a list written by hand.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride, dilation, project):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential(*shortcut) if project else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNetV1c(nn.Module):
    def __init__(self, depths):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        inputs = 64
        for i, (depth, stride, dilation) in enumerate(zip(depths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            blocks = []
            for j in range(depth):
                first = dilation // 2 if dilation > 1 else 1  # contract_dilation
                width = 64 * 2**i
                blocks.append(Bottleneck(inputs, width, 1 if j else stride, dilation if j else first, j == 0))
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        features = []
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
            features.append(x)
        return features


class FCNHead(nn.Module):
    def __init__(self, inputs, width, convs, concat, classes):
        super().__init__()
        self.convs = nn.Sequential(*(ConvModule(width if i else inputs, width, 3) for i in range(convs)))
        self.conv_cat = ConvModule(inputs + width, width, 3) if concat else None
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        y = self.convs(x)
        y = y if self.conv_cat is None else self.conv_cat(torch.cat([x, y], dim=1))
        return self.conv_seg(self.dropout(y))


class MmsegFCN(nn.Module):
    """Returns the logits of both heads."""

    def __init__(self, depths, classes):
        super().__init__()
        self.backbone = ResNetV1c(depths)
        self.decode_head = FCNHead(2048, 512, 2, True, classes)
        self.auxiliary_head = FCNHead(1024, 256, 1, False, classes)

    def forward(self, x):
        features = self.backbone(x)
        return self.decode_head(features[3]), self.auxiliary_head(features[2])


class Attention(nn.Module):
    """Reduced keys and values beside all queries, with PyTorch's packed attention."""

    def __init__(self, width, heads, reduction):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x, size):
        reduced = x
        if self.reduction > 1:
            maps = self.sr(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size))
            reduced = self.norm(maps.flatten(2).transpose(1, 2))
        return self.attn(x, reduced, reduced, need_weights=False)[0]


class MixFFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1), depthwise, nn.GELU(), nn.Identity(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x, size):
        return self.layers(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width, heads, reduction):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.ffn = Attention(width, heads, reduction), MixFFN(width, 4 * width)

    def forward(self, x, size):
        x = x + self.attn(self.norm1(x), size)
        return x + self.ffn(self.norm2(x), size)


class PatchEmbed(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.projection = nn.Conv2d(inputs, width, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x):
        x = self.projection(x)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class MiT(nn.Module):
    def __init__(self, widths, depths):
        super().__init__()
        self.layers = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            heads, reduction = (1, 2, 5, 8)[i], (8, 4, 2, 1)[i]
            embed = PatchEmbed(widths[i - 1] if i else 3, width, 2 if i else 4)
            blocks = nn.ModuleList(Block(width, heads, reduction) for _ in range(depth))
            self.layers.append(nn.ModuleList([embed, blocks, nn.LayerNorm(width, 1e-6)]))

    def forward(self, x):
        features = []
        for embed, blocks, norm in self.layers:
            x, size = embed(x)
            for block in blocks:
                x = block(x, size)
            x = norm(x).transpose(1, 2).reshape(x.shape[0], -1, *size)
            features.append(x)
        return features


class SegformerHead(nn.Module):
    def __init__(self, widths, classes):
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(width, 256, 1) for width in widths)
        self.fusion_conv = ConvModule(1024, 256, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(256, classes, 1)

    def forward(self, features):
        size = features[0].shape[2:]
        maps = [
            F.interpolate(conv(x), size=size, mode="bilinear", align_corners=False)
            for conv, x in zip(self.convs, features, strict=True)
        ]
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(maps, dim=1))))


class MmsegSegFormer(nn.Module):
    """Returns logits at a quarter of the image's size."""

    def __init__(self, classes, widths=(32, 64, 160, 256), depths=(2, 2, 2, 2)):
        super().__init__()
        self.backbone = MiT(widths, depths)
        self.decode_head = SegformerHead(widths, classes)

    def forward(self, x):
        return self.decode_head(self.backbone(x))
