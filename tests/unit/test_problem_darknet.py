import copy
import math
import pickle
import struct

import pytest
import torch
from torch import nn
from torch.nn import functional

from de_ray.evaluation.capture import capture
from de_ray.problem.build import build_architecture
from de_ray.problem.darknet import Darknet, MaxPool
from de_ray.problem.darknet_cfg import classes, parse, shipped
from de_ray.problem.darknet_weights import EPSILON, draw_weights, load_weights, values_of

NET = "[net]\nwidth=64\nheight=64\nchannels=3\n"
YOLO = "[yolo]\nmask=0,1\nanchors=4,6, 10,8, 20,20\nclasses=2\nnum=3\n"
BRANCHY = NET + """
# every kind of layer, with what the family does to it
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=8
size=1
pad=1
groups=2
activation=linear
[shortcut]
from=-2
activation=linear
[maxpool]
size=2
stride=1
[route]
layers=-1
groups=2
group_id=1
[convolutional]
batch_normalize=1
filters=6
size=3
stride=2
pad=1
activation=leaky
[upsample]
stride=2
[route]
layers=-1, 2
[convolutional]
filters=14
size=1
activation=linear
""" + YOLO


@pytest.mark.parametrize(("section", "option"), [
    ("[yolo]", "new_coords=1"), ("[yolo]", "anchors=-4,6"), ("[yolo]", "anchors=nan,6"), ("[yolo]", "mask=0.7"),
    ("[convolutional]", "stride_x=3"), ("[convolutional]", "antialiasing=1"), ("[convolutional]", "share_index=0"),
    ("[maxpool]", "maxpool_depth=1"), ("[shortcut]", "weights_type=per_feature"), ("[shortcut]", "alpha=0.5"),
    ("[route]", "layers=inf"), ("[maxpool]", "padding=7"), ("[convolutional]", "pad=0\nsize=5")])
def test_options_that_would_change_what_is_computed_are_refused_by_their_name(section, option):
    before, rest = BRANCHY.split(section, 1)
    own, *others = rest.split("\n[")
    text = "\n[".join([before + section + own + f"\n{option}", *others])  # what is said last counts
    with pytest.raises(ValueError, match=rf"\{section[:-1]}\] ({option.split('=')[0]}|size)=.*expected"):
        Darknet(parse(text))


def test_options_of_training_are_passed_over_and_unknown_ones_told(caplog):
    parse(BRANCHY.replace("[yolo]", "[yolo]\njitter=.3\nrandom=1"))
    assert not caplog.records
    parse(BRANCHY.replace("[yolo]", "[yolo]\nclases=3"))
    assert "[yolo] has options that are not known and change nothing: clases" in caplog.text


def test_the_text_of_a_network_tells_what_its_weights_do_not():
    assert repr(network()) == repr(network()) != repr(network(BRANCHY.replace("mask=", "mask=1, 0\n#")))


def network(text=BRANCHY):
    return Darknet(parse(text))


HEADER = struct.pack("<3iq", 0, 2, 0, 1)


def write(path, values, header=HEADER):
    path.write_bytes(header + values.numpy().astype("<f4").tobytes())
    return path


def random_values(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.1


def test_yolov3_has_the_published_size_and_heads():
    model = draw_weights(build_architecture("yolov3"), seed=0)
    assert abs(sum(p.numel() for p in model.parameters()) - 61.9e6) < 0.1e6
    assert values_of(model) == 62_001_757  # the published file's, of 248,007,048 bytes
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 75
    assert len(model.steps) == 107  # Darknet's count
    assert [(head.stride, head.classes, len(head.anchors)) for head in model.heads] == [(32, 80, 3), (16, 80, 3),
                                                                                         (8, 80, 3)]
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [tuple(output.shape) for output in outputs] == [(1, 255, 2, 2), (1, 255, 4, 4), (1, 255, 8, 8)]
    # Random weights through 75 layers: neither vanished nor exploded.
    assert all(0.1 < output.std() < 10 for output in outputs)


def test_the_shipped_yolov3_tiny_is_the_published_one(data_root):
    published = parse((data_root / "darknet" / "yolov3-tiny.cfg").read_text())
    assert Darknet(shipped("yolov3_tiny")).steps == Darknet(published).steps
    assert classes(published) == 80


def test_every_kind_of_layer_computes_what_darknet_does():
    model = draw_weights(network(), seed=1)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first = functional.leaky_relu(model.conv0(x), 0.1)  # [3, 8, 8, 8]
    summed = model.conv1(first) + first
    pooled = functional.max_pool2d(functional.pad(summed, (0, 1, 0, 1), value=-math.inf), 2, 1)
    down = functional.leaky_relu(model.conv5(pooled[:, 4:]), 0.1)  # [3, 6, 4, 4]
    up = down.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = model.conv8(torch.cat([up, summed], 1))
    (output,) = model(x)
    torch.testing.assert_close(output, expected)
    assert model.heads[0].anchors == ((4, 6), (10, 8)) and model.heads[0].stride == 2


@pytest.mark.parametrize(("size", "stride", "height"), [(2, 1, 13), (2, 2, 26), (2, 2, 13), (5, 1, 13), (4, 1, 7),
                                                        (3, 2, 8), (3, 3, 10), (13, 1, 13)])
def test_maxpool_windows_lie_where_darknet_puts_them(size, stride, height):
    x = torch.randn(2, 3, height, height + 1, generator=torch.Generator().manual_seed(0)) - 5  # padded zeros would show
    padding = size - 1
    out_h, out_w = ((side + padding - size) // stride + 1 for side in (height, height + 1))
    expected = torch.empty(2, 3, out_h, out_w)
    for i in range(out_h):
        for j in range(out_w):
            top, left = i * stride - padding // 2, j * stride - padding // 2
            window = x[:, :, max(top, 0):top + size, max(left, 0):left + size]
            expected[:, :, i, j] = window.amax((2, 3))
    assert MaxPool(size, stride, padding)(None, x, {}).equal(expected)


def test_bytes_and_floats_are_the_same_images():
    model = draw_weights(network(), seed=0)
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert model(images)[0].equal(model(images.float() / 255)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_network_is_captured_for_any_number_of_images(dtype):
    images = (255 * torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    images = images / 255 if dtype == torch.float32 else images
    model = draw_weights(network(), seed=0).requires_grad_(False)
    program = capture(model, images)
    for count in (1, 6):
        (found,), (expected,) = program.outputs(images[:count]), model(images[:count])
        torch.testing.assert_close(found, expected)


def test_networks_can_be_copied_and_pickled_and_have_short_keys():
    model = draw_weights(network(), seed=0)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(images)[0].equal(model(images)[0])
    assert list(model.state_dict())[:3] == ["conv0.weight", "conv0.bias", "conv1.weight"]


@pytest.mark.parametrize("header", [struct.pack("<3ii", 0, 1, 0, 7), struct.pack("<3iq", 0, 2, 0, 7),
                                    struct.pack("<3iq", 1, 0, 5, 7)], ids=["32-bit", "64-bit", "64-bit-major"])
def test_weights_are_read_with_batch_norm_folded(header, tmp_path):
    model = network()
    values = random_values(values_of(model))
    load_weights(model, write(tmp_path / "w", values, header))
    # By hand: the first layer's batch norm, then its convolution; the second's biases.
    beta, gamma, mean, variance = values[:32].split(8)
    kernel, following = values[32:32 + 216].reshape(8, 3, 3, 3), values[248:256]
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    raw = functional.conv2d(x, kernel, None, 2, 1)
    scale = (gamma / (variance.sqrt() + EPSILON))[:, None, None]
    torch.testing.assert_close(model.conv0(x), (raw - mean[:, None, None]) * scale + beta[:, None, None])
    assert model.conv1.bias.equal(following)
    assert model.conv8.weight.flatten().equal(values[-model.conv8.weight.numel():])
    assert not model.training


@pytest.mark.parametrize(("change", "said"), [(-1, "truncated"), (5, "of another network"), (-700, "truncated")])
def test_weights_of_another_size_say_how_many_values_were_expected_and_found(change, said, tmp_path):
    model = network()
    expected = values_of(model)
    path = write(tmp_path / "w", random_values(expected + change))
    with pytest.raises(ValueError, match=f"takes {expected:,} float32 .* holds {expected + change:,}: it is {said}"):
        load_weights(model, path)


def test_weights_that_end_within_a_value_or_are_not_finite_are_refused(tmp_path):
    model = network()
    values = random_values(values_of(model))
    path = write(tmp_path / "w", values)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"holds {len(values) - 1:,} and 2 bytes: it is truncated"):
        load_weights(model, path)
    values[40] = math.nan
    with pytest.raises(ValueError, match="value 40 after the header"):
        load_weights(model, write(path, values))
    path.write_bytes(b"\0" * 14)
    with pytest.raises(ValueError, match="14 bytes, too few for the header"):
        load_weights(model, path)


CONVOLUTION = "[convolutional]\nfilters=14\nactivation=linear\n"


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected .net. first"),
    (NET, "expected layers after it"),
    (NET.replace("channels=3", "channels=1") + CONVOLUTION, "colour"),
    ("width=3\n" + NET, "line 1='width=3'"),
    (NET + "[convolutional]\nfilters\n", "line 6='filters'"),
    (NET + "[lstm]\n", r"line 5: section \[lstm\] is not supported; there are \[convolutional\]"),
    (NET + "[convolutional]\nactivation=mish\n", "activation='mish'.*leaky or linear"),
    (NET + "[convolutional]\n", "activation='logistic'"),
    (NET + CONVOLUTION + "binary=1\n", "binary='1'"),
    (NET + CONVOLUTION + "size=big\n", "size='big': expected a whole number, at least 1"),
    (NET + CONVOLUTION + "stride=0\n", "stride='0'"),
    (NET + CONVOLUTION + "groups=2\n", "groups=2: expected a divisor of 3 channels"),
    (NET + CONVOLUTION + "dilation=2\n", "dilation='2'"),
    (NET + CONVOLUTION, "at least one .yolo. section"),
    (NET + CONVOLUTION + "[route]\nlayers=-2\n", "layers='-2': expected layers before this one, which is 1"),
    (NET + CONVOLUTION + "[route]\nlayers=x\n", "layers='x': expected whole numbers between commas"),
    (NET + CONVOLUTION + "[route]\nlayers=0\ngroups=2\ngroup_id=2\n", "group_id=2: expected less than groups=2"),
    (NET + CONVOLUTION + "[maxpool]\nsize=2\nstride=2\n[route]\nlayers=0,1\n", "one resolution"),
    (NET + 2 * CONVOLUTION.replace("14", "7") + CONVOLUTION + "[shortcut]\nfrom=-2\n", "previous one's 14 channels"),
    (NET + CONVOLUTION + YOLO.replace("mask=0,1", "mask=0,3"), "mask='0,3': expected numbers below 3"),
    (NET + CONVOLUTION + YOLO.replace("classes=2", "classes=3"), "classes=3: expected the previous layer's 14"),
])
def test_configurations_that_are_damaged_or_not_supported_name_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        network(text)


def test_heads_with_different_classes_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 9\]"):
        classes(parse(NET + CONVOLUTION + YOLO + CONVOLUTION.replace("14", "28") + YOLO.replace("=2\n", "=9\n")))
