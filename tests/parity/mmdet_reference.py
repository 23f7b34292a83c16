"""mmdetection's ATSS, CenterNet-update and YOLOv3 in plain PyTorch, with its names, for comparisons.

mmdetection itself needs a build of mmcv. These follow its description: the state dicts have the names and shapes of its
published files, which tests/weights/test_formats_detectors.py compares with a list written by hand. Images come one at a
time to `detect`, as mmdetection handles them.
"""

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

STRIDES = (8, 16, 32, 64, 128)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride, caffe, project):
        super().__init__()
        first, second = (stride, 1) if caffe else (1, stride)
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, first, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential(*shortcut) if project else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depths, caffe=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(inputs, 64 * 2**i, 2 if i and not j else 1, caffe, j == 0))
                inputs = 256 * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
            maps.append(x)
        return maps


class ConvModule(nn.Module):
    """A convolution called `conv`, and GroupNorm with ReLU, or BatchNorm with LeakyReLU 0.1, behind it."""

    def __init__(self, inputs, outputs, kernel, stride=1, norm=""):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
        if norm == "gn":
            self.gn = nn.GroupNorm(32, outputs)
        elif norm == "bn":
            self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = self.conv(x)
        if hasattr(self, "gn"):
            return F.relu(self.gn(x))
        return F.leaky_relu(self.bn(x), 0.1) if hasattr(self, "bn") else x


class FPN(nn.Module):
    def __init__(self, relu_before_extra):
        super().__init__()
        self.relu_before_extra = relu_before_extra
        self.lateral_convs = nn.ModuleList(ConvModule(channels, 256, 1) for channels in (512, 1024, 2048))
        self.fpn_convs = nn.ModuleList(ConvModule(256, 256, 3, 2 if i > 2 else 1) for i in range(5))

    def forward(self, maps):
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:], mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs[:3], maps, strict=True)]
        levels.append(self.fpn_convs[3](levels[-1]))
        levels.append(self.fpn_convs[4](F.relu(levels[-1]) if self.relu_before_extra else levels[-1]))
        return levels


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.scale


class Head(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(256, 256, 3, norm="gn") for _ in range(4)) for _ in range(2)
        )
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)
        for name, channels in outputs.items():
            setattr(self, name, nn.Conv2d(256, channels, 3, padding=1))

    def towers(self, x):
        y = x
        for one, other in zip(self.cls_convs, self.reg_convs, strict=True):
            x, y = one(x), other(y)
        return x, y


def suppressed(boxes, scores, labels, threshold, keep=100):
    """Greedy suppression of each class by itself, then the best."""
    kept = [
        torch.nonzero(labels == c)[:, 0][torchvision.ops.nms(boxes[labels == c], scores[labels == c], threshold)]
        for c in labels.unique()
    ]
    kept = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.long)
    kept = kept[scores[kept].argsort(descending=True, stable=True)][:keep]
    return boxes[kept], scores[kept], labels[kept]


def pairs_above(scores, threshold, most):
    """The best (place, class) pairs."""
    place, label = torch.nonzero(scores > threshold, as_tuple=True)
    value, order = scores[place, label].sort(descending=True, stable=True)
    return place[order[:most]], label[order[:most]], value[:most]


class Dense(nn.Module):
    """A ResNet, a pyramid and a shared head."""

    def forward(self, x):
        return [
            self.level(x, scale)
            for x, scale in zip(self.neck(self.backbone(x)[1:]), self.bbox_head.scales, strict=True)
        ]

    def detect(self, x, size):
        return self.find(self(x), size)

    def find(self, levels, size):
        found = []
        for stride, maps in zip(STRIDES, levels, strict=True):
            rows, columns = maps[0].shape[2:]
            flat = [m[0].permute(1, 2, 0).reshape(rows * columns, -1) for m in maps]
            place, label, score = pairs_above(flat[0].sigmoid(), 0.05, 1000)
            y, x_ = torch.div(place, columns, rounding_mode="floor"), place % columns
            boxes = self.boxes(x_.float(), y.float(), flat[1][place], stride)
            boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
            valid = (boxes[:, 2:] > boxes[:, :2]).all(1)
            score = score * flat[2][place, 0].sigmoid() if len(flat) > 2 else score
            found.append((boxes[valid], score[valid], label[valid]))
        return suppressed(*(torch.cat(column) for column in zip(*found, strict=True)), 0.6)


class ATSS(Dense):
    def __init__(self, depths, classes):
        super().__init__()
        self.backbone, self.neck = ResNet(depths), FPN(False)
        self.bbox_head = Head({"atss_cls": classes, "atss_reg": 4, "atss_centerness": 1})

    def level(self, x, scale):
        head = self.bbox_head
        x, y = head.towers(x)
        return head.atss_cls(x), scale(head.atss_reg(y)), head.atss_centerness(y)

    @staticmethod
    def boxes(x, y, deltas, stride):
        side = 8 * stride
        dx, dy, dw, dh = (deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])).unbind(1)
        bound = math.log(1000 / 16)
        cx, cy = x * stride + dx * side, y * stride + dy * side
        w, h = side * dw.clamp(-bound, bound).exp(), side * dh.clamp(-bound, bound).exp()
        return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)


class CenterNet(Dense):
    def __init__(self, depths, classes):
        super().__init__()
        self.backbone, self.neck = ResNet(depths, caffe=True), FPN(True)
        self.bbox_head = Head({"conv_cls": classes, "conv_reg": 4})

    def level(self, x, scale):
        x, y = self.bbox_head.towers(x)
        return self.bbox_head.conv_cls(x), scale(self.bbox_head.conv_reg(y)).clamp(min=0)

    @staticmethod
    def boxes(x, y, distances, stride):
        cx, cy = x * stride + stride / 2, y * stride + stride / 2
        left, top, right, bottom = (distances * stride).unbind(1)
        return torch.stack([cx - left, cy - top, cx + right, cy + bottom], 1)


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (
            ConvModule(channels, channels // 2, 1, norm="bn"),
            ConvModule(channels // 2, channels, 3, norm="bn"),
        )

    def forward(self, x):
        return x + self.conv2(self.conv1(x))


class DarkNet(nn.Module):
    def __init__(self, depths):
        super().__init__()
        self.conv1 = ConvModule(3, 32, 3, norm="bn")
        for i, depth in enumerate(depths):
            block = nn.Sequential()
            block.add_module("conv", ConvModule(32 * 2**i, 64 * 2**i, 3, 2, norm="bn"))
            for j in range(depth):
                block.add_module(f"res{j}", ResBlock(64 * 2**i))
            setattr(self, f"conv_res_block{i + 1}", block)

    def forward(self, x):
        x, maps = self.conv1(x), []
        for i in range(1, 6):
            x = getattr(self, f"conv_res_block{i}")(x)
            maps.append(x)
        return maps[2:]


class Detect(nn.Sequential):
    def __init__(self, inputs, n):
        super().__init__()
        for i in range(1, 6):
            inner = (n, 3) if i % 2 == 0 else (2 * n, 1)
            layer = ConvModule(inputs if i == 1 else inner[0], n if i % 2 else 2 * n, inner[1], norm="bn")
            self.add_module(f"conv{i}", layer)


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.detect1, self.detect2, self.detect3 = Detect(1024, 512), Detect(768, 256), Detect(384, 128)
        self.conv1, self.conv2 = ConvModule(512, 256, 1, norm="bn"), ConvModule(256, 128, 1, norm="bn")

    def forward(self, maps):
        out = [self.detect1(maps[2])]
        for conv, detect, finer in ((self.conv1, self.detect2, maps[1]), (self.conv2, self.detect3, maps[0])):
            out.append(detect(torch.cat([F.interpolate(conv(out[-1]), scale_factor=2), finer], 1)))
        return out


class YOLOHead(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.convs_bridge = nn.ModuleList(ConvModule(n, 2 * n, 3, norm="bn") for n in (512, 256, 128))
        self.convs_pred = nn.ModuleList(nn.Conv2d(2 * n, 3 * (5 + classes), 1) for n in (512, 256, 128))

    def forward(self, maps):
        layers = zip(self.convs_bridge, self.convs_pred, maps, strict=True)
        return [pred(bridge(x)) for bridge, pred, x in layers]


class YOLOv3(nn.Module):
    ANCHORS = (
        ((116, 90), (156, 198), (373, 326)),
        ((30, 61), (62, 45), (59, 119)),
        ((10, 13), (16, 30), (33, 23)),
    )

    def __init__(self, depths, classes):
        super().__init__()
        self.backbone, self.neck, self.bbox_head = DarkNet(depths), Neck(), YOLOHead(classes)

    def forward(self, x):
        return self.bbox_head(self.neck(self.backbone(x)))

    def detect(self, x, size):
        return self.find(self(x), size)

    def find(self, levels, size):
        del size  # boxes are not clipped
        boxes, confidence, classes = [], [], []
        for stride, anchors, maps in zip((32, 16, 8), self.ANCHORS, levels, strict=True):
            rows, columns = maps.shape[2:]
            flat = maps[0].permute(1, 2, 0).reshape(rows, columns, 3, -1)
            y, x_ = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            cell = torch.stack([x_, y], -1)[:, :, None].float()
            center = (cell + flat[..., :2].sigmoid()) * stride
            side = torch.tensor(anchors, dtype=torch.float32) * flat[..., 2:4].exp()
            boxes.append(torch.cat([center - side / 2, center + side / 2], -1).reshape(-1, 4))
            confidence.append(flat[..., 4].sigmoid().reshape(-1))
            classes.append(flat[..., 5:].sigmoid().reshape(len(boxes[-1]), -1))
        boxes, confidence, classes = torch.cat(boxes), torch.cat(confidence), torch.cat(classes)
        kept = confidence >= 0.005
        boxes, confidence, classes = boxes[kept], confidence[kept], classes[kept]
        place, label, score = pairs_above(classes, 0.05, 1000)
        boxes, score = boxes[place], score * confidence[place]
        return suppressed(boxes, score, label, 0.45)
