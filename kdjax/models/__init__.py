"""Flax Linen modules to distil from and into. Anything else that is a Flax module will do as well."""

from kdjax.models._cnn import CNN
from kdjax.models._convolutions import cpu_convolution, im2col_convolution
from kdjax.models._layers import Convolution, max_pool
from kdjax.models._mlp import MLP
from kdjax.models._mobilenet import MobileNetV2
from kdjax.models._narrowing import narrow
from kdjax.models._resnet import ResNet, ResNet18
from kdjax.models._shufflenet import ShuffleNet, ShuffleNetV2
from kdjax.models._squeezenet import SqueezeNet
from kdjax.models._stems import Stem
from kdjax.models._transformer import VisionTransformer
from kdjax.models._vgg import VGG
from kdjax.models._wide_resnet import WideResNet
from kdjax.models._winograd import winograd_convolution

__all__ = [
    'CNN',
    'MLP',
    'VGG',
    'Convolution',
    'MobileNetV2',
    'ResNet',
    'ResNet18',
    'ShuffleNet',
    'ShuffleNetV2',
    'SqueezeNet',
    'Stem',
    'VisionTransformer',
    'WideResNet',
    'cpu_convolution',
    'im2col_convolution',
    'max_pool',
    'narrow',
    'winograd_convolution',
]
